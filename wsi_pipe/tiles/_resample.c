/* Cuts a tile from a patch of pixels by a separable filter: down first, as rows come, then across, eight rows at a time.
 * With AVX2 and FMA on x86-64; four numbers at a time where the processor multiplies and adds with one rounding
 * (ARM64 and others). Sums are taken in one order, so that all of them give the same pixels.
 *
 * Elsewhere (an x86-64 of before 2013, MSVC) nothing is ever done, and matrix products do it. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* WSI_PLAIN: what others than x86-64 run, there too, for tests. */
#if defined(__GNUC__) && defined(__x86_64__) && !defined(WSI_PLAIN)
#define AVX2 1
#define SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#elif defined(__aarch64__) || defined(__FP_FAST_FMAF)
#define PLAIN 1
#define SUPPORTED 1
#else
#define SUPPORTED 0
#if defined(_MSC_VER)
#pragma message("_resample.c: made for GCC and Clang; tiles will be resampled by matrix products")
#endif
#endif

EXPORT int wsi_resample_abi(void) { return SUPPORTED ? 1 : 0; }

#if defined(AVX2) || defined(PLAIN)

#define LANES 8  /* rows that are filtered across together, numbers to a vector */
#define CHUNK 64 /* samples of a row that are filtered down together */
#define MAX_SIDE (1 << 20)
#define MAX_TAPS (1 << 16)

struct axis {             /* of one output pixel after the other */
    const int32_t *first; /* first pixel of the patch that it is made of; never less than that of the one before */
    const float *weights; /* of that pixel and the taps - 1 after it */
    int64_t taps;
};

static int fits(const struct axis *axis, int64_t size, int64_t length)
{
    if (axis->taps < 1 || axis->taps > MAX_TAPS || axis->taps > length) return 0;
    for (int64_t i = 0; i < size; i++)
        if (axis->first[i] < (i ? axis->first[i - 1] : 0) || axis->first[i] > length - axis->taps) return 0;
    return 1;
}

static int64_t up_to(int64_t length, int64_t step) { return (length + step - 1) / step * step; }

#if defined(AVX2)

#include <immintrin.h>

#define FAST static __attribute__((target("avx2,fma")))

/* Samples as numbers, and zeros up to the end of the row. */
FAST void to_numbers(const uint8_t *samples, int64_t count, float *to, int64_t row)
{
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const __m256i whole = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(samples + i)));
        _mm256_storeu_ps(to + i, _mm256_cvtepi32_ps(whole));
    }
    for (; i < count; i++) to[i] = (float)samples[i];
    for (; i < row; i++) to[i] = 0;
}

/* A row of weighted sums over rows first, first + 1, ... of a ring. */
FAST void filter_down(const float *ring, int64_t mask, int64_t row, int64_t first, const float *weights, int64_t taps,
                      float *to)
{
    for (int64_t i = 0; i < row; i += CHUNK) {
        __m256 sum[CHUNK / LANES];
        for (int k = 0; k < CHUNK / LANES; k++) sum[k] = _mm256_setzero_ps();
        for (int64_t t = 0; t < taps; t++) {
            const float *from = ring + ((first + t) & mask) * row + i;
            const __m256 weight = _mm256_broadcast_ss(weights + t);
            for (int k = 0; k < CHUNK / LANES; k++)
                sum[k] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(from + LANES * k), sum[k]);
        }
        for (int k = 0; k < CHUNK / LANES; k++) _mm256_storeu_ps(to + i + LANES * k, sum[k]);
    }
}

/* Three channels of an output pixel in eight rows, of columns of eight. Two taps in turn: one sum would wait for itself. */
FAST void filter_across(const float *from, const float *weights, int64_t taps, float *to)
{
    __m256 sum[6];
    for (int k = 0; k < 6; k++) sum[k] = _mm256_setzero_ps();
    int64_t t = 0;
    for (; t + 2 <= taps; t += 2, from += 6 * LANES) {
        const __m256 one = _mm256_broadcast_ss(weights + t), other = _mm256_broadcast_ss(weights + t + 1);
        for (int k = 0; k < 3; k++) {
            sum[k] = _mm256_fmadd_ps(one, _mm256_loadu_ps(from + LANES * k), sum[k]);
            sum[k + 3] = _mm256_fmadd_ps(other, _mm256_loadu_ps(from + LANES * (k + 3)), sum[k + 3]);
        }
    }
    if (t < taps) {
        const __m256 one = _mm256_broadcast_ss(weights + t);
        for (int k = 0; k < 3; k++) sum[k] = _mm256_fmadd_ps(one, _mm256_loadu_ps(from + LANES * k), sum[k]);
    }
    for (int k = 0; k < 3; k++) _mm256_storeu_ps(to + LANES * k, _mm256_add_ps(sum[k], sum[k + 3]));
}

/* Eight rows of `length` numbers, a multiple of eight, turned: number i of row j, at rows[j * from + i], goes to
 * to[i * apart + j]. */
FAST void turn(const float *rows, int64_t from, int64_t length, float *to, int64_t apart)
{
    for (int64_t i = 0; i < length; i += 8) {
        __m256 a[8], b[8];
        for (int j = 0; j < 8; j++) a[j] = _mm256_loadu_ps(rows + j * from + i);
        for (int j = 0; j < 8; j += 2) {
            b[j] = _mm256_unpacklo_ps(a[j], a[j + 1]);
            b[j + 1] = _mm256_unpackhi_ps(a[j], a[j + 1]);
        }
        for (int j = 0; j < 8; j += 4)
            for (int k = 0; k < 2; k++) {
                a[j + 2 * k] = _mm256_shuffle_ps(b[j + k], b[j + 2 + k], 0x44);
                a[j + 2 * k + 1] = _mm256_shuffle_ps(b[j + k], b[j + 2 + k], 0xEE);
            }
        for (int j = 0; j < 4; j++) {
            _mm256_storeu_ps(to + apart * (i + j), _mm256_permute2f128_ps(a[j], a[j + 4], 0x20));
            _mm256_storeu_ps(to + apart * (i + j + 4), _mm256_permute2f128_ps(a[j], a[j + 4], 0x31));
        }
    }
}

/* Numbers as samples: limited, and rounded to the nearest, the even one of two. There are numbers up to a multiple of 32. */
FAST void to_samples(const float *numbers, int64_t count, uint8_t *to)
{
    const __m256 most = _mm256_set1_ps(255), least = _mm256_setzero_ps();
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t i = 0; i < count; i += 32) {
        __m256i whole[4], bytes;
        for (int k = 0; k < 4; k++)
            whole[k] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(_mm256_loadu_ps(numbers + i + 8 * k), least), most));
        bytes = _mm256_packus_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
        bytes = _mm256_permutevar8x32_epi32(bytes, order);
        if (count - i >= 32) {
            _mm256_storeu_si256((__m256i *)(to + i), bytes);
        } else {
            uint8_t last[32];
            _mm256_storeu_si256((__m256i *)last, bytes);
            memcpy(to + i, last, (size_t)(count - i));
        }
    }
}

#else

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__FMA__)
#include <immintrin.h>
#endif

/* Samples as numbers, and zeros up to the end of the row. */
static void to_numbers(const uint8_t *samples, int64_t count, float *to, int64_t row)
{
    for (int64_t i = 0; i < count; i++) to[i] = (float)samples[i];
    for (int64_t i = count; i < row; i++) to[i] = 0;
}

/* Four numbers that lie anywhere. */
typedef float four __attribute__((vector_size(16), may_alias, aligned(4)));

/* a * b + c, rounded once. */
static inline four sum_of(four a, four b, four c)
{
#if defined(__aarch64__)
    return (four)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(__FMA__)
    return (four)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#else
    for (int k = 0; k < 4; k++) c[k] = fmaf(a[k], b[k], c[k]);
    return c;
#endif
}

static inline four all(float number) { return (four){number, number, number, number}; }

/* A row of weighted sums over rows first, first + 1, ... of a ring. */
static void filter_down(const float *ring, int64_t mask, int64_t row, int64_t first, const float *weights, int64_t taps,
                        float *to)
{
    for (int64_t i = 0; i < row; i += CHUNK / 2) {
        four sum[CHUNK / 8];
        for (int k = 0; k < CHUNK / 8; k++) sum[k] = all(0);
        for (int64_t t = 0; t < taps; t++) {
            const four *from = (const four *)(ring + ((first + t) & mask) * row + i);
            const four weight = all(weights[t]);
            for (int k = 0; k < CHUNK / 8; k++) sum[k] = sum_of(weight, from[k], sum[k]);
        }
        for (int k = 0; k < CHUNK / 8; k++) ((four *)(to + i))[k] = sum[k];
    }
}

/* Three channels of an output pixel in eight rows, of columns of eight. Two taps in turn, as with AVX2. */
static void filter_across(const float *from, const float *weights, int64_t taps, float *to)
{
    four even[6], odd[6];
    for (int k = 0; k < 6; k++) even[k] = odd[k] = all(0);
    const four *in = (const four *)from;
    int64_t t = 0;
    for (; t + 2 <= taps; t += 2, in += 12) {
        const four one = all(weights[t]), other = all(weights[t + 1]);
        for (int k = 0; k < 6; k++) {
            even[k] = sum_of(one, in[k], even[k]);
            odd[k] = sum_of(other, in[k + 6], odd[k]);
        }
    }
    if (t < taps) {
        const four one = all(weights[t]);
        for (int k = 0; k < 6; k++) even[k] = sum_of(one, in[k], even[k]);
    }
    for (int k = 0; k < 6; k++) ((four *)to)[k] = even[k] + odd[k];
}

/* Eight rows of `length` numbers, a multiple of eight, turned: number i of row j, at rows[j * from + i], goes to
 * to[i * apart + j]. */
static void turn(const float *rows, int64_t from, int64_t length, float *to, int64_t apart)
{
    for (int64_t i = 0; i < length; i += 4)
        for (int64_t j = 0; j < LANES; j += 4) {
            const four a = *(const four *)(rows + j * from + i), b = *(const four *)(rows + (j + 1) * from + i);
            const four c = *(const four *)(rows + (j + 2) * from + i), d = *(const four *)(rows + (j + 3) * from + i);
            for (int k = 0; k < 4; k++) *(four *)(to + (i + k) * apart + j) = (four){a[k], b[k], c[k], d[k]};
        }
}

/* Numbers as samples: limited, and rounded to the nearest, the even one of two. */
static void to_samples(const float *numbers, int64_t count, uint8_t *to)
{
    for (int64_t i = 0; i < count; i++) {
        const float above = numbers[i] > 0 ? numbers[i] : 0, limited = above < 255 ? above : 255;
        /* At 1.5 * 2^23 and above a float holds whole numbers only. */
        to[i] = (uint8_t)((limited + 12582912.0f) - 12582912.0f);
    }
}

#endif

/* Makes a tile of `size` x `size` RGB pixels from a patch of `width` x `height`, all of them side by side. For each axis:
 * the first pixel of the patch, the weights of it and of those after it (`size` x taps), and their number. Returns 0; -1
 * where there is no memory, -2 where a filter reaches beyond the patch. */
EXPORT int wsi_resample(const uint8_t *patch, int64_t width, int64_t height, const int32_t *across_first,
                        const float *across_weights, int64_t across_taps, const int32_t *down_first,
                        const float *down_weights, int64_t down_taps, uint8_t *out, int64_t size)
{
    const struct axis across = {across_first, across_weights, across_taps};
    const struct axis down = {down_first, down_weights, down_taps};
    if (size < 1 || size > MAX_SIDE || width > MAX_SIDE || height > MAX_SIDE) return -2;
    if (!fits(&across, size, width) || !fits(&down, size, height)) return -2;

    const int64_t samples = 3 * width, row = up_to(samples, CHUNK), outs = 3 * size, made = up_to(outs, 32);
    int64_t ring = 1;
    while (ring < down.taps) ring *= 2;
    /* Rows of the patch as numbers, as many as a row of the tile is made of; rows filtered down; the same in columns; the
     * result in columns, and in rows. All begin at multiples of 32 bytes. */
    const size_t wanted = (size_t)(ring * row + 2 * LANES * row + 2 * LANES * made) * sizeof(float) + 32;
    uint8_t *const room = malloc(wanted);
    if (!room) return -1;
    float *const rows = (float *)(((uintptr_t)room + 31) & ~(uintptr_t)31);
    float *const filtered = rows + ring * row, *const turned = filtered + LANES * row;
    float *const columns = turned + LANES * row, *const result = columns + LANES * made;
    memset(columns, 0, (size_t)(LANES * made) * sizeof *columns);

    int64_t loaded = 0;
    for (int64_t top = 0; top < size; top += LANES) {
        const int64_t count = size - top < LANES ? size - top : LANES;
        for (int64_t j = 0; j < count; j++) {
            const int64_t first = down.first[top + j];
            if (loaded < first) loaded = first;
            for (; loaded < first + down.taps; loaded++)
                to_numbers(patch + loaded * samples, samples, rows + (loaded & (ring - 1)) * row, row);
            filter_down(rows, ring - 1, row, first, down.weights + (top + j) * down.taps, down.taps, filtered + j * row);
        }
        for (int64_t j = count; j < LANES; j++) memset(filtered + j * row, 0, (size_t)row * sizeof *filtered);
        turn(filtered, row, row, turned, LANES);
        for (int64_t x = 0; x < size; x++)
            filter_across(turned + 3 * LANES * (int64_t)across.first[x], across.weights + x * across.taps, across.taps,
                          columns + 3 * LANES * x);
        for (int64_t i = 0; i < made; i += LANES) turn(columns + LANES * i, LANES, LANES, result + i, made);
        for (int64_t j = 0; j < count; j++) to_samples(result + j * made, outs, out + (top + j) * outs);
    }
    free(room);
    return 0;
}

#endif
