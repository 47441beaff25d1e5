/* Baseline JPEG tiles at full, half, quarter or eighth size, exactly as libjpeg-turbo decodes them, but faster.
 *
 * One call decodes a whole batch of tiles of one image into places given by the caller, and needs neither Python nor any
 * library, so Python's lock is free meanwhile. What is in any way unusual (another process, another sampling, a bad code,
 * data that ends early or late, values that no encoder makes) is left undone, and the caller hands it to libjpeg-turbo,
 * which then decides what is damaged. So nothing here may be lenient: a tile is done only where libjpeg-turbo would have
 * decoded it without a warning, to the same bytes.
 *
 * Where the speed comes from: the entropy-coded bytes are freed of their stuffing first, so that the bit reader needs no
 * tests; a symbol, its run and its value cost one look-up and no branch; two blocks go through the inverse DCT at a time.
 *
 * The arithmetic follows ITU-T T.81 (tables, zigzag, Huffman decoding: annexes C and F) and libjpeg's integer inverse DCT
 * after Loeffler, Ligtenberg and Moschytz, with its 4 x 4 and 2 x 2 forms, which average neighbouring outputs. All of it
 * is linear in whole numbers between two roundings, so the order of sums is free and the results are the same.
 *
 * The file is untrusted. Sizes are checked before use; the bit reader may run past the end of the data by what one MCU
 * can take at most, and its buffer has that much room.
 */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#include <errno.h>
#include <time.h>
#include <unistd.h>
#define EXPORT __attribute__((visibility("default")))
#endif

/* libjpeg-turbo has SIMD code on these, which is what this equals (shown on x86-64, and by the tests on ARM64 wherever they
 * run); its plain code wraps instead of saturating where samples overshoot far. Elsewhere nothing is ever done. */
#if defined(__GNUC__) && (defined(__x86_64__) || (defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__))
#define SUPPORTED 1
#else
#define SUPPORTED 0
#if defined(_MSC_VER)
#pragma message("_jpeg.c: made for GCC and Clang; libjpeg-turbo will decode all tiles")
#endif
#endif

#define ABI 2

EXPORT int wsi_jpeg_abi(void) { return SUPPORTED ? ABI : 0; }

#if SUPPORTED

#define ALWAYS static inline __attribute__((always_inline))
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,bmi2")))
#endif

#define LOOK 11        /* bits that one look-up resolves: more take more of the first cache than they save */
#define MAX_SIDE 65500 /* libjpeg's own limit */
/* A block takes at most 27 bits for DC and 63 times 26 for AC: 209 bytes. An MCU has at most six. */
#define ROOM 2048
/* Of 64 samples within 128 of the middle the energy is at most 1024^2, and rounding to the quantisation adds little. Up to
 * here no 16-bit step of any SIMD inverse DCT can overflow, so they all agree with each other and with the sums here. */
#define MAX_ENERGY (1600 * 1600)
#define MAX_TERM 1600

/* Where coefficient k of the zigzag goes in a pair of blocks: row * 16 + column, the columns in the order
 * 0 4 2 6 7 5 3 1, so that neighbours are what the inverse DCT multiplies together. After the end of a block (128 and on)
 * everything goes to a place that nobody reads. */
#define SPILL 128
static const uint8_t NATURAL[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};
static const uint8_t COLUMN[8] = {0, 7, 2, 6, 1, 5, 3, 4};

struct table { /* a Huffman table as stored */
    int known;
    uint8_t counts[17], values[256];
};

struct codes { /* and as used, by the next LOOK bits; see SLOW */
    uint32_t look[1 << LOOK];
    uint32_t next[17], limit[17]; /* first code of each length, and one past the last */
    int first[17];                /* index of its value */
    const struct table *table;
    int is_dc;
};

struct component {
    int id, h, v, quant;
    int dc, ac; /* tables */
};

struct header {
    uint16_t quant[4][64]; /* in zigzag order */
    int quant_known[4];
    struct table tables[2][4];
    struct component parts[3];
    int count, width, height, has_frame, jfif, adobe, restart;
};

/* Two blocks side by side: row i of the first is quant[16 i .. 16 i + 7], of the second the eight after. */
struct pair {
    int part[2];                    /* component of each block; -1 for none */
    int x[2], y[2];                 /* place in the MCU, in blocks of the component */
    int size;                       /* side of the block after the inverse DCT */
    int16_t quant[128], most[128];  /* steps of quantisation, and what a coefficient may be at most */
};

struct plan { /* all that tiles of one header share */
    struct header header;
    struct codes codes[2][4];
    uint8_t place[256];
    struct pair pairs[3];
    int pair_count, mcu_x, mcu_y; /* blocks of luma in an MCU */
    int size[3], ycbcr, reduce;
    int wide, tall; /* how many samples of luma come to one of chroma after the inverse DCT, across and down: 1 or 2 */
};

/* Stores of it clear a block faster than what compilers make of memset. */
typedef int16_t eight __attribute__((vector_size(16), may_alias));

struct reader {
    uint64_t bits; /* next bits, highest first; below the `left` first ones may stand what comes after */
    unsigned left; /* modulo 64 */
    const uint8_t *at;
};

/* ---- the header ---- */

static unsigned big16(const uint8_t *p) { return (unsigned)p[0] << 8 | p[1]; }

static int read_quant(struct header *h, const uint8_t *p, size_t n)
{
    while (n) {
        if (n < 65 || p[0] > 3) return 0; /* 16-bit values are left to libjpeg */
        for (int i = 0; i < 64; i++) {
            if (!p[1 + i]) return 0;
            h->quant[p[0]][i] = p[1 + i];
        }
        h->quant_known[p[0]] = 1;
        p += 65, n -= 65;
    }
    return 1;
}

static int read_huffman(struct header *h, const uint8_t *p, size_t n)
{
    while (n) {
        if (n < 17 || (p[0] & 0xEF) > 3) return 0;
        struct table *t = &h->tables[p[0] >> 4][p[0] & 3];
        size_t total = 0;
        for (int i = 1; i <= 16; i++) total += p[i];
        if (total > 256 || n < 17 + total) return 0;
        memset(t, 0, sizeof *t);
        memcpy(t->counts + 1, p + 1, 16);
        memcpy(t->values, p + 17, total);
        t->known = 1;
        p += 17 + total, n -= 17 + total;
    }
    return 1;
}

static int read_frame(struct header *h, const uint8_t *p, size_t n)
{
    if (h->has_frame || n < 6 || p[0] != 8 || (p[5] != 1 && p[5] != 3) || n != 6 + 3 * (size_t)p[5]) return 0;
    h->height = (int)big16(p + 1), h->width = (int)big16(p + 3), h->count = p[5];
    for (int i = 0; i < h->count; i++) {
        struct component *c = &h->parts[i];
        c->id = p[6 + 3 * i], c->h = p[7 + 3 * i] >> 4, c->v = p[7 + 3 * i] & 15, c->quant = p[8 + 3 * i];
        if (c->quant > 3) return 0;
        for (int j = 0; j < i; j++)
            if (h->parts[j].id == c->id) return 0;
    }
    h->has_frame = 1;
    return 1;
}

static int read_scan(struct header *h, const uint8_t *p, size_t n)
{
    if (!h->has_frame || n != 4 + 2 * (size_t)h->count || p[0] != h->count) return 0;
    for (int i = 0; i < h->count; i++) {
        if (p[1 + 2 * i] != h->parts[i].id || (p[2 + 2 * i] & 0xCC)) return 0;
        h->parts[i].dc = p[2 + 2 * i] >> 4, h->parts[i].ac = p[2 + 2 * i] & 3;
    }
    p += 1 + 2 * h->count;
    return p[0] == 0 && p[1] == 63 && p[2] == 0;
}

/* Reads segments up to the scan. Returns the bytes before the entropy-coded data, or 0 where anything is unusual. The
 * tables that a TIFF keeps apart are read first, with tables_only. */
static size_t read_segments(struct header *h, const uint8_t *data, size_t size, int tables_only)
{
    size_t at = 0;
    if (!tables_only) {
        if (size < 2 || data[0] != 0xFF || data[1] != 0xD8) return 0;
        at = 2;
    }
    while (size - at >= 4) {
        if (data[at] != 0xFF) return 0;
        int marker = data[at + 1], good;
        size_t length = big16(data + at + 2);
        if (length < 2 || length > size - at - 2) return 0;
        const uint8_t *body = data + at + 4;
        size_t n = length - 2;
        if (marker == 0xDB) good = read_quant(h, body, n);
        else if (marker == 0xC4) good = read_huffman(h, body, n);
        else if (marker == 0xDD) good = n == 2, h->restart = good ? (int)big16(body) : 0;
        else if (tables_only) good = 0;
        else if (marker == 0xC0 || marker == 0xC1) good = read_frame(h, body, n);
        else if (marker >= 0xE0 && marker <= 0xEF) {
            good = 1;
            if (marker == 0xE0 && n >= 5 && !memcmp(body, "JFIF", 5)) h->jfif = 1;
            if (marker == 0xEE && n >= 12 && !memcmp(body, "Adobe", 5)) h->adobe = body[11];
        } else good = marker == 0xFE || marker == 0xDA;
        if (!good) return 0;
        at += 2 + length;
        if (marker == 0xDA) return read_scan(h, body, n) ? at : 0;
    }
    return tables_only && at == size ? 1 : 0;
}

/* A symbol that a look-up does not resolve with its value: bits of the code << 16 | bits of the value << 21 | run << 25, or
 * nothing where even the code is longer. A resolved one is bits in all | step << 8 | value << 16. The step of the former
 * leads out of the block, so that one comparison finds it and the end of the block. */
#define SLOW 192
#define SLOW_LENGTH(e) ((e) >> 16 & 31)
#define SLOW_BITS(e) ((e) >> 21 & 15)
#define SLOW_RUN(e) ((e) >> 25)

static uint32_t slow_entry(int symbol, int length, int is_dc)
{
    /* More bits than 8-bit samples can need are left to libjpeg. */
    if (is_dc ? symbol > 11 : (symbol & 15) > 10) return SLOW << 8;
    return SLOW << 8 | (uint32_t)length << 16 | (uint32_t)(symbol & 15) << 21 | (uint32_t)(symbol >> 4) << 25;
}

/* The value of bits that follow a code, sign extended (T.81, figure F.12): they are the first ones of `rest`. */
ALWAYS int extended(uint64_t rest, unsigned size)
{
    int value = (int)(rest >> 1 >> (63 - size)), negative = (int)~((int64_t)rest >> 63);
    return value - (negative & ((1 << size) - 1));
}

/* No bits of value: sixteen zeros, or the end of the block (whatever the run, as in libjpeg), a step beyond any run. */
ALWAYS unsigned step_of(uint32_t slow) { return SLOW_BITS(slow) ? SLOW_RUN(slow) + 1 : SLOW_RUN(slow) == 15 ? 16 : SPILL; }

static int make_codes(struct codes *c, const struct table *t, int is_dc)
{
    if (!t->known) return 0;
    c->table = t, c->is_dc = is_dc;
    for (int i = 0; i < 1 << LOOK; i++) c->look[i] = SLOW << 8;
    uint32_t code = 0;
    int index = 0;
    for (int length = 1; length <= 16; length++) {
        c->next[length] = code, c->first[length] = index;
        /* As in libjpeg: a code must fit, and none may be all ones. */
        if (t->counts[length] && code + t->counts[length] >= 1u << length) return 0;
        for (int i = 0; i < t->counts[length]; i++, code++, index++) {
            if (is_dc && t->values[index] > 15) return 0;
            if (length > LOOK) continue;
            const uint32_t slow = slow_entry(t->values[index], length, is_dc);
            const unsigned bits = SLOW_BITS(slow), all = (unsigned)length + bits;
            const int resolved = all <= LOOK && SLOW_LENGTH(slow);
            const unsigned values = resolved ? 1u << bits : 1, each = 1u << (LOOK - (resolved ? all : (unsigned)length));
            uint32_t *look = c->look + (code << (LOOK - length));
            for (uint64_t v = 0; v < values; v++) {
                uint32_t e = slow;
                if (resolved) e = all | step_of(slow) << 8 | (uint32_t)extended(v << 32 << (32 - bits), bits) << 16;
                for (unsigned j = 0; j < each; j++) *look++ = e;
            }
        }
        c->limit[length] = code;
        code <<= 1;
    }
    return 1;
}

/* The symbol of a code that the look-up does not hold, as a slow entry; 0 where there is none. */
static __attribute__((noinline)) uint32_t long_code(const struct codes *c, uint64_t bits)
{
    for (int length = 1; length <= 16; length++) {
        uint32_t code = (uint32_t)(bits >> (64 - length)), slow;
        if (code >= c->limit[length]) continue;
        slow = slow_entry(c->table->values[(c->first[length] + (int)(code - c->next[length])) & 255], length, c->is_dc);
        return SLOW_LENGTH(slow) ? slow : 0;
    }
    return 0;
}

static void make_pair(struct plan *plan, int a, int ax, int ay, int b, int bx, int by)
{
    struct pair *p = &plan->pairs[plan->pair_count++];
    const struct header *h = &plan->header;
    p->part[0] = a, p->x[0] = ax, p->y[0] = ay;
    p->part[1] = b, p->x[1] = bx, p->y[1] = by;
    p->size = plan->size[a];
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 64; k++) {
            int q = h->quant[h->parts[p->part[i] < 0 ? a : p->part[i]].quant][k];
            p->quant[plan->place[k] + 8 * i] = (int16_t)q;
            p->most[plan->place[k] + 8 * i] = (int16_t)(MAX_TERM / q);
        }
}

/* Returns the bytes before the entropy-coded data, 0 where the header is not one of ours. */
static size_t make_plan(struct plan *plan, const uint8_t *data, size_t size, const uint8_t *tables, size_t tables_size,
                        int width, int height, int components, int ycbcr, int reduce)
{
    struct header *h = &plan->header;
    memset(h, 0, sizeof *h);
    h->adobe = -1;
    if (tables_size && !read_segments(h, tables, tables_size, 1)) return 0;
    size_t start = read_segments(h, data, size, 0);
    if (!start || h->width != width || h->height != height || h->count != components) return 0;
    struct component *c = h->parts;
    plan->ycbcr = ycbcr || h->jfif || h->adobe == 1;
    plan->reduce = reduce;
    if (h->count == 3 && (c[1].h != 1 || c[1].v != 1 || c[2].h != 1 || c[2].v != 1)) return 0;
    if (c->h < 1 || c->h > 4 || c->v < 1 || c->v > 4) return 0;
    /* Alone, a component has one block in an MCU, whatever its factors (T.81, A.2.2). */
    if (h->count == 1) c->h = c->v = 1;
    if (c->h > 2 || c->v > c->h) return 0;
    if (h->count == 3 && c->h > 1 && !plan->ycbcr) return 0;
    for (int i = 0; i < h->count; i++) {
        if (!h->quant_known[c[i].quant]) return 0;
        if (!make_codes(&plan->codes[0][c[i].dc], &h->tables[0][c[i].dc], 1)) return 0;
        if (!make_codes(&plan->codes[1][c[i].ac], &h->tables[1][c[i].ac], 0)) return 0;
    }
    for (int k = 0; k < 256; k++) plan->place[k] = SPILL;
    for (int k = 0; k < 64; k++) plan->place[k] = (uint8_t)(NATURAL[k] / 8 * 16 + COLUMN[NATURAL[k] % 8]);
    /* libjpeg makes chroma larger in its inverse DCT where that saves enlarging it afterwards, both ways at once. */
    int side = 8 / reduce, larger = c->v == 2 && reduce > 1;
    plan->size[0] = side, plan->size[1] = plan->size[2] = larger ? 2 * side : side;
    plan->mcu_x = c->h, plan->mcu_y = c->v, plan->wide = larger ? 1 : c->h, plan->tall = larger ? 1 : c->v;
    plan->pair_count = 0;
    for (int y = 0; y < c->v; y++) make_pair(plan, 0, 0, y, c->h == 2 ? 0 : -1, 1, y);
    if (h->count == 3) make_pair(plan, 1, 0, 0, 2, 0, 0);
    return start;
}

/* ---- entropy-coded data ---- */

/* Copies data without stuffing up to the next marker or the end. Returns the bytes copied; *at goes past the marker,
 * which is *marker, 0 at the end of the data, -1 where it is unusual. */
static size_t unstuff(const uint8_t *data, size_t size, size_t *at, uint8_t *out, int *marker)
{
    size_t from = *at, n = 0;
    for (;;) {
        const uint8_t *found = memchr(data + from, 0xFF, size - from);
        size_t stop = found ? (size_t)(found - data) : size;
        memcpy(out + n, data + from, stop - from);
        n += stop - from;
        if (!found) {
            *marker = 0, *at = size;
            break;
        }
        /* Fill bytes and an end in the middle of a marker are unusual. */
        int next = stop + 1 < size ? data[stop + 1] : 0xFF;
        from = stop + 2;
        if (next) {
            *marker = next == 0xFF ? -1 : next, *at = stop + 2;
            break;
        }
        out[n++] = 0xFF;
    }
    memset(out + n, 0, ROOM);
    return n;
}

/* Makes at least 56 bits ready. */
ALWAYS void refill(struct reader *r)
{
    uint64_t word;
    memcpy(&word, r->at, 8);
    r->bits |= __builtin_bswap64(word) >> (r->left & 63);
    r->at += ~r->left >> 3 & 7;
    r->left |= 56;
}

/* Takes a symbol of a slow entry with its value. */
ALWAYS int take(struct reader *r, uint32_t slow)
{
    int value = extended(r->bits << SLOW_LENGTH(slow), SLOW_BITS(slow));
    unsigned all = SLOW_LENGTH(slow) + SLOW_BITS(slow);
    r->bits <<= all;
    r->left -= all;
    return value;
}

/* Decodes one block into every second half row of `out`, which is zero. Returns -1 on bad data, else whether any
 * coefficient but the first is there. */
ALWAYS int read_block(struct reader *reader, const struct codes *dc, const struct codes *ac, const uint8_t *place, int *last,
                      int16_t *out)
{
    struct reader r = *reader; /* a copy can stay in registers */
    refill(&r);
    uint32_t e = dc->look[r.bits >> (64 - LOOK)];
    int value = *last;
    if ((e >> 8 & 255) != SLOW) {
        value += (int32_t)e >> 16;
        r.bits <<= e & 63;
        r.left -= e;
    } else {
        if (!SLOW_LENGTH(e) && !(e = long_code(dc, r.bits))) return -1;
        value += take(&r, e);
    }
    if (UNLIKELY((unsigned)(value + 2048) > 4095)) return -1;
    *last = value;
    out[0] = (int16_t)value;
    unsigned k = 0;
    const uint32_t *look = ac->look;
#define SYMBOL                              \
    e = look[r.bits >> (64 - LOOK)];        \
    r.bits <<= e & 63;                      \
    r.left -= e;                            \
    k += e >> 8 & 255;                      \
    out[place[k]] = (int16_t)(e >> 16);     \
    if (k >= 63) goto stop;
    for (;;) {
        /* What is resolved takes LOOK bits at most, and 56 are there. */
        refill(&r);
        SYMBOL SYMBOL SYMBOL SYMBOL SYMBOL
        continue;
    stop:
        if (k < SLOW) break;
        k -= SLOW;
        refill(&r);
        if (!SLOW_LENGTH(e) && !(e = long_code(ac, r.bits))) return -1;
        k += step_of(e);
        out[place[k]] = (int16_t)take(&r, e);
        if (k >= 63) break;
    }
#undef SYMBOL
    *reader = r;
    return k > 63 && k < SPILL ? -1 : k != SPILL;
}

/* ---- inverse DCT ---- */

static uint8_t sample(int32_t value)
{
    return (uint8_t)(value < -128 ? 0 : value > 127 ? 255 : value + 128);
}

/* Blocks of one value each; its inverse DCT is an eighth of it everywhere. */
static int flat_blocks(const int16_t *coef, const struct pair *p, uint8_t *const out[2], ptrdiff_t stride)
{
    for (int b = 0; b < 2; b++) {
        if (abs(coef[8 * b]) > p->most[8 * b]) return 0;
        int value = sample((coef[8 * b] * p->quant[8 * b] + 4) >> 3);
        for (int y = 0; y < p->size; y++) memset(out[b] + y * stride, value, (size_t)p->size);
    }
    return 1;
}

/* One dimension: inputs 0 4 2 6 7 5 3 1 to `size` outputs, scaled by 2^13 (8 outputs), 2^14 (4) or 2^15 (2). The multipliers
 * are libjpeg's, of 13 bits, summed up by input. The odd sums come with one sign in the first half of the outputs, and
 * with the other, mirrored, in the second. */
ALWAYS void transform(const int32_t in[8], int32_t *out, int size)
{
    int32_t even[4], odd[4];
    if (size == 8) {
        int32_t a = (in[0] + in[1]) * 8192, b = (in[0] - in[1]) * 8192;
        int32_t c = in[2] * 10703 + in[3] * 4433, d = in[2] * 4433 - in[3] * 10704;
        even[0] = a + c, even[1] = b + d, even[2] = b - d, even[3] = a - c;
        odd[0] = in[4] * 2260 + in[5] * 6437 + in[6] * 9633 + in[7] * 11363;
        odd[1] = in[4] * -6436 + in[5] * -11362 + in[6] * -2259 + in[7] * 9633;
        odd[2] = in[4] * 9633 + in[5] * 2261 + in[6] * -11362 + in[7] * 6437;
        odd[3] = in[4] * -11363 + in[5] * 9633 + in[6] * -6436 + in[7] * 2260;
    } else if (size == 4) {
        int32_t a = in[0] * 16384, c = in[2] * 15137 - in[3] * 6270;
        even[0] = a + c, even[1] = a - c;
        odd[0] = in[4] * -4176 + in[5] * -4926 + in[6] * 7373 + in[7] * 20995;
        odd[1] = in[4] * -1730 + in[5] * 11893 + in[6] * -17799 + in[7] * 8697;
    } else {
        even[0] = in[0] * 32768;
        odd[0] = in[4] * -5906 + in[5] * 6967 + in[6] * -10426 + in[7] * 29692;
    }
    for (int i = 0; i < size / 2; i++) out[i] = even[i] + odd[i], out[size - 1 - i] = even[i] - odd[i];
}

ALWAYS int inverse_plain(const int16_t *coef, const struct pair *p, uint8_t *const out[2], ptrdiff_t stride, int size)
{
    static const uint8_t ROW[8] = {0, 4, 2, 6, 7, 5, 3, 1};
    const int shift = size == 8 ? 11 : size == 4 ? 12 : 13;
    int32_t columns[16][8];
    int64_t energy[2] = {0, 0};
    for (int x = 0; x < 16; x++) {
        int32_t in[8], sums[8];
        for (int i = 0; i < 8; i++) {
            int at = 16 * ROW[i] + x;
            if (abs(coef[at]) > p->most[at]) return 0;
            in[i] = coef[at] * p->quant[at];
            energy[x >> 3] += in[i] * in[i];
        }
        transform(in, sums, size);
        for (int y = 0; y < size; y++) columns[x][y] = (sums[y] + (1 << (shift - 1))) >> shift;
    }
    if (energy[0] > MAX_ENERGY || energy[1] > MAX_ENERGY) return 0;
    for (int b = 0; b < 2; b++)
        for (int y = 0; y < size; y++) {
            int32_t in[8], sums[8];
            for (int i = 0; i < 8; i++) in[i] = columns[8 * b + i][y];
            transform(in, sums, size);
            for (int x = 0; x < size; x++)
                out[b][y * stride + x] = sample((sums[x] + (1 << (shift + 6))) >> (shift + 7));
        }
    return 1;
}

static int inverse_any(const int16_t *coef, const struct pair *p, uint8_t *const out[2], ptrdiff_t stride)
{
    if (p->size == 8) return inverse_plain(coef, p, out, stride, 8);
    if (p->size == 4) return inverse_plain(coef, p, out, stride, 4);
    return inverse_plain(coef, p, out, stride, 2);
}

#ifdef AVX2

#define PAIR(a, b) _mm256_set1_epi32((int)((uint32_t)(uint16_t)(a) | (uint32_t)(uint16_t)(b) << 16))
#define SUM(v, w, a, b, c, d) _mm256_add_epi32(_mm256_madd_epi16(v, PAIR(a, b)), _mm256_madd_epi16(w, PAIR(c, d)))

/* As `transform` with rounding, on eight columns or rows at a time; in[i] holds pairs of inputs. */
AVX2 ALWAYS void transform_avx2(const __m256i in[4], __m256i *out, int size, int shift)
{
    const __m256i half = _mm256_set1_epi32(1 << (shift - 1));
    __m256i even[4], odd[4];
    if (size == 8) {
        __m256i a = _mm256_add_epi32(_mm256_madd_epi16(in[0], PAIR(8192, 8192)), half);
        __m256i b = _mm256_add_epi32(_mm256_madd_epi16(in[0], PAIR(8192, -8192)), half);
        __m256i c = _mm256_madd_epi16(in[1], PAIR(10703, 4433));
        __m256i d = _mm256_madd_epi16(in[1], PAIR(4433, -10704));
        even[0] = _mm256_add_epi32(a, c), even[3] = _mm256_sub_epi32(a, c);
        even[1] = _mm256_add_epi32(b, d), even[2] = _mm256_sub_epi32(b, d);
        odd[0] = SUM(in[2], in[3], 2260, 6437, 9633, 11363);
        odd[1] = SUM(in[2], in[3], -6436, -11362, -2259, 9633);
        odd[2] = SUM(in[2], in[3], 9633, 2261, -11362, 6437);
        odd[3] = SUM(in[2], in[3], -11363, 9633, -6436, 2260);
    } else if (size == 4) {
        __m256i a = _mm256_add_epi32(_mm256_madd_epi16(in[0], PAIR(16384, 0)), half);
        __m256i c = _mm256_madd_epi16(in[1], PAIR(15137, -6270));
        even[0] = _mm256_add_epi32(a, c), even[1] = _mm256_sub_epi32(a, c);
        odd[0] = SUM(in[2], in[3], -4176, -4926, 7373, 20995);
        odd[1] = SUM(in[2], in[3], -1730, 11893, -17799, 8697);
    } else {
        even[0] = _mm256_add_epi32(_mm256_slli_epi32(_mm256_madd_epi16(in[0], PAIR(16384, 0)), 1), half);
        odd[0] = SUM(in[2], in[3], -5906, 6967, -10426, 29692);
    }
    for (int i = 0; i < size / 2; i++) {
        out[i] = _mm256_srai_epi32(_mm256_add_epi32(even[i], odd[i]), shift);
        out[size - 1 - i] = _mm256_srai_epi32(_mm256_sub_epi32(even[i], odd[i]), shift);
    }
}

/* Four rows of eight 16-bit values to, for each pair of columns, that pair in all four rows; in both halves alike. */
AVX2 ALWAYS void turn_avx2(const __m256i *row, __m256i out[4])
{
    __m256i a = _mm256_unpacklo_epi32(row[0], row[1]), b = _mm256_unpackhi_epi32(row[0], row[1]);
    __m256i c = _mm256_unpacklo_epi32(row[2], row[3]), d = _mm256_unpackhi_epi32(row[2], row[3]);
    out[0] = _mm256_unpacklo_epi64(a, c), out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d), out[3] = _mm256_unpackhi_epi64(b, d);
}

AVX2 ALWAYS int inverse_avx2(const int16_t *coef, const struct pair *p, uint8_t *const out[2], ptrdiff_t stride, int size)
{
    static const uint8_t ROW[8] = {0, 4, 2, 6, 7, 5, 3, 1};
    const int shift = size == 8 ? 11 : size == 4 ? 12 : 13;
    __m256i in[8], beyond = _mm256_setzero_si256(), energy = beyond;
    for (int i = 0; i < 8; i++) {
        __m256i v = _mm256_load_si256((const __m256i *)(coef + 16 * ROW[i]));
        beyond = _mm256_or_si256(beyond, _mm256_cmpgt_epi16(_mm256_abs_epi16(v),
                                                            _mm256_loadu_si256((const __m256i *)(p->most + 16 * ROW[i]))));
        in[i] = _mm256_mullo_epi16(v, _mm256_loadu_si256((const __m256i *)(p->quant + 16 * ROW[i])));
        energy = _mm256_add_epi32(energy, _mm256_madd_epi16(in[i], in[i]));
    }
    energy = _mm256_add_epi32(energy, _mm256_shuffle_epi32(energy, 0x4E));
    energy = _mm256_add_epi32(energy, _mm256_shuffle_epi32(energy, 0xB1));
    beyond = _mm256_or_si256(beyond, _mm256_cmpgt_epi32(energy, _mm256_set1_epi32(MAX_ENERGY)));
    if (UNLIKELY(!_mm256_testz_si256(beyond, beyond))) return 0;

    __m256i low[8], high[8], row[8], turned[4];
    for (int i = 0; i < 4; i++) turned[i] = _mm256_unpacklo_epi16(in[2 * i], in[2 * i + 1]);
    transform_avx2(turned, low, size, shift);
    for (int i = 0; i < 4; i++) turned[i] = _mm256_unpackhi_epi16(in[2 * i], in[2 * i + 1]);
    transform_avx2(turned, high, size, shift);
    for (int i = 0; i < size; i++) row[i] = _mm256_packs_epi32(low[i], high[i]);
    if (size == 2) row[2] = row[3] = _mm256_setzero_si256();

    const __m256i middle = _mm256_set1_epi8((char)0x80);
    turn_avx2(row, turned);
    transform_avx2(turned, low, size, shift + 7);
    if (size == 8) {
        turn_avx2(row + 4, turned);
        transform_avx2(turned, high, size, shift + 7);
        const __m256i weave = _mm256_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15, 0, 8, 1, 9, 2, 10, 3, 11, 4,
                                               12, 5, 13, 6, 14, 7, 15);
        __m256i two[4];
        for (int i = 0; i < 4; i++) {
            __m256i a = _mm256_packs_epi32(low[2 * i], high[2 * i]), b = _mm256_packs_epi32(low[2 * i + 1], high[2 * i + 1]);
            two[i] = _mm256_xor_si256(_mm256_shuffle_epi8(_mm256_packs_epi16(a, b), weave), middle);
        }
        __m256i a = _mm256_unpacklo_epi16(two[0], two[1]), b = _mm256_unpackhi_epi16(two[0], two[1]);
        __m256i c = _mm256_unpacklo_epi16(two[2], two[3]), d = _mm256_unpackhi_epi16(two[2], two[3]);
        __m256i lines[4] = {_mm256_unpacklo_epi32(a, c), _mm256_unpackhi_epi32(a, c), _mm256_unpacklo_epi32(b, d),
                            _mm256_unpackhi_epi32(b, d)};
        for (int i = 0; i < 4; i++) {
            __m128i first = _mm256_castsi256_si128(lines[i]), second = _mm256_extracti128_si256(lines[i], 1);
            _mm_storel_epi64((__m128i *)(out[0] + 2 * i * stride), first);
            _mm_storeh_pd((double *)(out[0] + (2 * i + 1) * stride), _mm_castsi128_pd(first));
            _mm_storel_epi64((__m128i *)(out[1] + 2 * i * stride), second);
            _mm_storeh_pd((double *)(out[1] + (2 * i + 1) * stride), _mm_castsi128_pd(second));
        }
    } else {
        __m256i a = _mm256_packs_epi32(low[0], low[1]), b = size == 4 ? _mm256_packs_epi32(low[2], low[3]) : a;
        const __m256i weave = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13, 2,
                                               6, 10, 14, 3, 7, 11, 15);
        __m256i lines = _mm256_xor_si256(_mm256_shuffle_epi8(_mm256_packs_epi16(a, b), weave), middle);
        uint32_t words[8] __attribute__((aligned(32)));
        _mm256_store_si256((__m256i *)words, lines);
        for (int b2 = 0; b2 < 2; b2++)
            for (int y = 0; y < size; y++) memcpy(out[b2] + y * stride, &words[4 * b2 + y], (size_t)size);
    }
    return 1;
}

AVX2 static int inverse8_avx2(const int16_t *coef, const struct pair *p, uint8_t *const out[2], ptrdiff_t stride)
{
    return inverse_avx2(coef, p, out, stride, 8);
}

AVX2 static int inverse4_avx2(const int16_t *coef, const struct pair *p, uint8_t *const out[2], ptrdiff_t stride)
{
    return inverse_avx2(coef, p, out, stride, 4);
}

AVX2 static int inverse2_avx2(const int16_t *coef, const struct pair *p, uint8_t *const out[2], ptrdiff_t stride)
{
    return inverse_avx2(coef, p, out, stride, 2);
}

#endif

/* ---- colour ---- */

/* One row of YCbCr to RGB, as jdcolor.c by its tables: 1.402, 0.34414, 0.71414 and 1.772 in 16 bits. */
static void rgb_row_any(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *out, int from, int width)
{
    for (int x = from; x < width; x++) {
        int b = cb[x] - 128, r = cr[x] - 128;
        int red = y[x] + ((91881 * r + 32768) >> 16), blue = y[x] + ((116130 * b + 32768) >> 16);
        int green = y[x] + ((-22554 * b - 46802 * r + 32768) >> 16);
        out[3 * x] = (uint8_t)(red < 0 ? 0 : red > 255 ? 255 : red);
        out[3 * x + 1] = (uint8_t)(green < 0 ? 0 : green > 255 ? 255 : green);
        out[3 * x + 2] = (uint8_t)(blue < 0 ? 0 : blue > 255 ? 255 : blue);
    }
}

#ifdef AVX2

/* Sixteen pixels at a time. Multipliers beyond 16 bits are split into a whole part, which needs no rounding, and a rest. */
AVX2 static void rgb_row_avx2(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *out, int width)
{
    const __m256i centre = _mm256_set1_epi16(128), one = _mm256_set1_epi16(1);
    const __m256i half = _mm256_set1_epi32(32768), green = PAIR(-22554, 65536 - 46802);
    int x = 0;
    for (; x + 16 <= width; x += 16) {
        __m256i l = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(y + x)));
        __m256i b = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(cb + x))), centre);
        __m256i r = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(cr + x))), centre);
        __m256i b2 = _mm256_add_epi16(b, b), r2 = _mm256_add_epi16(r, r);
        /* (2 c k / 2^16 + 1) / 2, rounded down each time, is (c k + 2^15) / 2^16 rounded down. */
        __m256i r_rest = _mm256_srai_epi16(_mm256_add_epi16(_mm256_mulhi_epi16(r2, _mm256_set1_epi16(91881 - 65536)), one), 1);
        __m256i b_rest = _mm256_srai_epi16(_mm256_add_epi16(_mm256_mulhi_epi16(b2, _mm256_set1_epi16(116130 - 131072)), one), 1);
        __m256i g_low = _mm256_add_epi32(_mm256_madd_epi16(_mm256_unpacklo_epi16(b, r), green), half);
        __m256i g_high = _mm256_add_epi32(_mm256_madd_epi16(_mm256_unpackhi_epi16(b, r), green), half);
        __m256i g_rest = _mm256_packs_epi32(_mm256_srai_epi32(g_low, 16), _mm256_srai_epi32(g_high, 16));
        __m256i red = _mm256_add_epi16(_mm256_add_epi16(l, r), r_rest);
        __m256i gre = _mm256_add_epi16(_mm256_sub_epi16(l, r), g_rest);
        __m256i blu = _mm256_add_epi16(_mm256_add_epi16(l, b2), b_rest);
        __m256i rg = _mm256_permute4x64_epi64(_mm256_packus_epi16(red, gre), 0xD8);
        __m128i R = _mm256_castsi256_si128(rg), G = _mm256_extracti128_si256(rg, 1);
        __m128i B = _mm_packus_epi16(_mm256_castsi256_si128(blu), _mm256_extracti128_si256(blu, 1));
        __m128i o0 = _mm_or_si128(
            _mm_or_si128(_mm_shuffle_epi8(R, _mm_setr_epi8(0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1, 5)),
                         _mm_shuffle_epi8(G, _mm_setr_epi8(-1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1))),
            _mm_shuffle_epi8(B, _mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1)));
        __m128i o1 = _mm_or_si128(
            _mm_or_si128(_mm_shuffle_epi8(R, _mm_setr_epi8(-1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10, -1)),
                         _mm_shuffle_epi8(G, _mm_setr_epi8(5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10))),
            _mm_shuffle_epi8(B, _mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1)));
        __m128i o2 = _mm_or_si128(
            _mm_or_si128(_mm_shuffle_epi8(R, _mm_setr_epi8(-1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1, -1)),
                         _mm_shuffle_epi8(G, _mm_setr_epi8(-1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1))),
            _mm_shuffle_epi8(B, _mm_setr_epi8(10, -1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15)));
        _mm_storeu_si128((__m128i *)(out + 3 * x), o0);
        _mm_storeu_si128((__m128i *)(out + 3 * x + 16), o1);
        _mm_storeu_si128((__m128i *)(out + 3 * x + 32), o2);
    }
    rgb_row_any(y, cb, cr, out, x, width);
}

#endif

/* A row of chroma to twice its width: jdsample.c's "fancy" triangle filter, which leaves narrow rows and the eighth scale
 * to plain repetition. */
ALWAYS void double_row(const uint8_t *in, uint8_t *out, int width, int smooth)
{
    if (!smooth || width < 3) {
        for (int x = 0; x < width; x++) out[2 * x] = out[2 * x + 1] = in[x];
        return;
    }
    out[0] = in[0], out[1] = (uint8_t)((3 * in[0] + in[1] + 2) >> 2);
    for (int x = 1; x < width - 1; x++) {
        out[2 * x] = (uint8_t)((3 * in[x] + in[x - 1] + 1) >> 2);
        out[2 * x + 1] = (uint8_t)((3 * in[x] + in[x + 1] + 2) >> 2);
    }
    out[2 * width - 2] = (uint8_t)((3 * in[width - 1] + in[width - 2] + 1) >> 2);
    out[2 * width - 1] = in[width - 1];
}

/* Row y of what a chroma plane of `height` rows becomes at twice its width and height, by the same filter both ways. Each
 * row lies nearer to one row of the plane than to another; beyond the plane its first or last row is repeated. `sums` has
 * room for width + 2. */
ALWAYS void double_both(const uint8_t *plane, size_t stride, int y, uint8_t *out, uint16_t *sums, int width, int height)
{
    const int row = y / 2, beside = y & 1 ? row + 1 : row - 1;
    const uint8_t *near = plane + (size_t)row * stride;
    const uint8_t *far = plane + (size_t)(beside < 0 ? 0 : beside >= height ? height - 1 : beside) * stride;
    if (width < 3) {
        for (int x = 0; x < width; x++) out[2 * x] = out[2 * x + 1] = near[x];
        return;
    }
    for (int x = 0; x < width; x++) sums[x + 1] = (uint16_t)(3 * near[x] + far[x]);
    sums[0] = sums[1], sums[width + 1] = sums[width];
    for (int x = 0; x < width; x++) {
        out[2 * x] = (uint8_t)((3 * sums[x + 1] + sums[x] + 8) >> 4);
        out[2 * x + 1] = (uint8_t)((3 * sums[x + 1] + sums[x + 2] + 7) >> 4);
    }
}

/* ---- a tile ---- */

struct room { /* grown as needed, for one call */
    uint8_t *bytes, *samples;
    size_t bytes_size, samples_size;
};

static int grow(uint8_t **block, size_t *size, size_t wanted)
{
    if (*size >= wanted) return 1;
    free(*block);
    *block = malloc(wanted);
    *size = *block ? wanted : 0;
    return *block != NULL;
}

struct place { /* where a tile goes: channels is 3 for RGB, or 1 for grey alone */
    uint8_t *pixels;
    ptrdiff_t stride;
    int channels;
};

/* Rows of samples as pixels: of one strip, or of the whole tile where chroma is made taller. */
ALWAYS void write_rows(const struct plan *plan, uint8_t *const plane[3], uint8_t *const wide[2], size_t stride, int rows,
                       int width, uint8_t *out, const struct place *place, const int avx2)
{
    const int chroma_width = (plan->header.width * plan->size[1] + 15) / 16, chroma_height = (rows + 1) / 2;
    uint16_t *const sums = (uint16_t *)(wide[1] + stride);
    for (int y = 0; y < rows; y++, out += place->stride) {
        const uint8_t *a = plane[0] + (size_t)y * stride, *b = plane[1] + (size_t)y * stride, *c = plane[2] + (size_t)y * stride;
        if (plan->header.count == 1) {
            if (place->channels == 1) memcpy(out, a, (size_t)width);
            else
                for (int x = 0; x < width; x++) out[3 * x] = out[3 * x + 1] = out[3 * x + 2] = a[x];
            continue;
        }
        if (!plan->ycbcr) {
            for (int x = 0; x < width; x++) out[3 * x] = a[x], out[3 * x + 1] = b[x], out[3 * x + 2] = c[x];
            continue;
        }
        if (plan->wide == 2) {
            for (int i = 1; i < 3; i++)
                if (plan->tall == 2) double_both(plane[i], stride, y, wide[i - 1], sums, chroma_width, chroma_height);
                else double_row(plane[i] + (size_t)y * stride, wide[i - 1], chroma_width, plan->reduce < 8);
            b = wide[0], c = wide[1];
        }
#ifdef AVX2
        if (avx2) {
            rgb_row_avx2(a, b, c, out, width);
            continue;
        }
#endif
        rgb_row_any(a, b, c, out, 0, width);
    }
}

ALWAYS int inverse(const int16_t *coef, const struct pair *p, uint8_t *const out[2], ptrdiff_t stride, int detail, const int avx2)
{
    if (!detail || p->size == 1) return flat_blocks(coef, p, out, stride);
#ifdef AVX2
    if (avx2) {
        if (p->size == 8) return inverse8_avx2(coef, p, out, stride);
        return p->size == 4 ? inverse4_avx2(coef, p, out, stride) : inverse2_avx2(coef, p, out, stride);
    }
#endif
    return inverse_any(coef, p, out, stride);
}

/* Whether what an interval had was all used, but for the bits that fill its last byte. */
static int used_up(const struct reader *r, const uint8_t *bytes, size_t length)
{
    size_t used = (size_t)(r->at - bytes) * 8 - (r->left & 63);
    return used <= 8 * length && 8 * length - used < 8;
}

ALWAYS int read_tile(const struct plan *plan, const uint8_t *data, size_t size, size_t start, struct room *room,
                     const struct place *place, const int avx2)
{
    const struct header *h = &plan->header;
    const int side = plan->size[0], reduce = plan->reduce, strip = plan->mcu_y * side;
    const int down = (h->height + 8 * plan->mcu_y - 1) / (8 * plan->mcu_y);
    const int across = (h->width + 8 * plan->mcu_x - 1) / (8 * plan->mcu_x);
    const int out_w = (h->width + reduce - 1) / reduce, out_h = (h->height + reduce - 1) / reduce;
    /* Colour is read 16 samples at a time; blocks beside the picture are decoded too. */
    const size_t stride = ((size_t)(across * plan->mcu_x * side) + 63) & ~(size_t)31;
    if (!grow(&room->bytes, &room->bytes_size, size - start + ROOM)) return 0;
    /* Chroma that is made taller needs the rows above and below, so all rows are kept until the end. Besides the planes
     * there are two rows for chroma made larger, two for sums of 16 bits, and eight for blocks that nobody wants. */
    const size_t kept = (size_t)strip * (size_t)(plan->tall == 2 ? down : 1);
    if (!grow(&room->samples, &room->samples_size, stride * (3 * kept + 4 + 8))) return 0;
    uint8_t *plane[3], *wide[2], *nowhere = room->samples + stride * (3 * kept + 4);
    for (int i = 0; i < 3; i++) plane[i] = room->samples + stride * kept * (size_t)i;
    for (int i = 0; i < 2; i++) wide[i] = room->samples + stride * (3 * kept + (size_t)i);

    int16_t coef[SPILL + 32] __attribute__((aligned(32)));
    eight *const clear = (eight *)coef;
    int last[3] = {0, 0, 0}, marker = 0, restarts = 0, left = h->restart;
    size_t at = start, length = unstuff(data, size, &at, room->bytes, &marker);
    struct reader r = {0, 0, room->bytes};
    for (int my = 0; my < down; my++) {
        const size_t above = plan->tall == 2 ? (size_t)my : 0;
        for (int mx = 0; mx < across; mx++) {
            if (h->restart && !left--) {
                if (marker != 0xD0 + restarts || !used_up(&r, room->bytes, length)) return 0;
                length = unstuff(data, size, &at, room->bytes, &marker);
                r = (struct reader){0, 0, room->bytes};
                last[0] = last[1] = last[2] = 0;
                restarts = (restarts + 1) & 7, left = h->restart - 1;
            }
            for (int i = 0; i < plan->pair_count; i++) {
                const struct pair *p = &plan->pairs[i];
                uint8_t *to[2] = {nowhere, nowhere};
                int detail = 0;
                for (int j = 0; j < 16; j++) clear[j] = (eight){0};
                for (int b = 0; b < 2; b++) {
                    int c = p->part[b];
                    if (c < 0) continue;
                    int found = read_block(&r, &plan->codes[0][h->parts[c].dc], &plan->codes[1][h->parts[c].ac], plan->place,
                                           &last[c], coef + 8 * b);
                    if (UNLIKELY(found < 0)) return 0;
                    detail |= found;
                    size_t x = (size_t)(c ? 1 : plan->mcu_x) * (size_t)mx + (size_t)p->x[b];
                    size_t y = (size_t)(c ? 1 : plan->mcu_y) * above + (size_t)p->y[b];
                    to[b] = plane[c] + (x + y * stride) * (size_t)p->size;
                }
                if (UNLIKELY(!inverse(coef, p, to, (ptrdiff_t)stride, detail, avx2))) return 0;
            }
            if (UNLIKELY(r.at > room->bytes + length + 8)) return 0;
        }
        if (plan->tall == 2) continue;
        const int top = my * strip, rows = out_h - top < strip ? out_h - top : strip;
        if (rows > 0) write_rows(plan, plane, wide, stride, rows, out_w, place->pixels + top * place->stride, place, avx2);
    }
    if (plan->tall == 2) write_rows(plan, plane, wide, stride, out_h, out_w, place->pixels, place, avx2);
    /* The end of the data stands for an end marker, which the caller would have added. */
    return (marker == 0xD9 || marker == 0) && used_up(&r, room->bytes, length);
}

static int read_tile_any(const struct plan *plan, const uint8_t *data, size_t size, size_t start, struct room *room,
                         const struct place *place)
{
    return read_tile(plan, data, size, start, room, place, 0);
}

#ifdef AVX2
AVX2 static int read_tile_avx2(const struct plan *plan, const uint8_t *data, size_t size, size_t start, struct room *room,
                               const struct place *place)
{
    return read_tile(plan, data, size, start, room, place, 1);
}
#endif

/* Decodes `count` tiles of `width` x `height` px at 1 / `reduce`. data and sizes: their streams. pixels and strides: where
 * their rows begin and how far apart they are in bytes; room for ceil(side / reduce) rows and columns of `channels` bytes.
 * tables: segments of a TIFF's JPEGTables, as if they stood at the start of each stream. ycbcr: whether three components
 * are YCbCr though the stream may not say so. done: set to 1 for each tile that was decoded, 0 for the others, whose
 * pixels may be written all the same. plain: whether to do without AVX2. */
EXPORT void wsi_jpeg_decode(int64_t count, const uint8_t *const *data, const int64_t *sizes, uint8_t *const *pixels,
                            const int64_t *strides, uint8_t *done, const uint8_t *tables, int64_t tables_size, int width,
                            int height, int components, int ycbcr, int reduce, int channels, int plain)
{
    struct room room = {0};
    struct plan *plan = malloc(sizeof *plan);
    const uint8_t *head = NULL;
    size_t start = 0;
    /* Scaled, a side below 8 px may meet several of libjpeg's scales, and which one is taken is not for us to guess. */
    const int least = reduce > 1 ? 8 : 1;
    int usable = plan && width >= least && height >= least && width <= MAX_SIDE && height <= MAX_SIDE &&
                 (components == 1 || components == 3) && (channels == 3 || channels == components) &&
                 (reduce == 1 || reduce == 2 || reduce == 4 || reduce == 8);
    (void)plain;
    for (int64_t i = 0; i < count; i++) {
        done[i] = 0;
        if (!usable || sizes[i] <= 0) continue;
        size_t size = (size_t)sizes[i];
        /* Tiles of an image mostly begin with the same bytes. */
        if (!start || start > size || memcmp(head, data[i], start)) {
            head = data[i];
            start = make_plan(plan, head, size, tables, (size_t)tables_size, width, height, components, ycbcr, reduce);
            if (!start) continue;
        }
        struct place place = {pixels[i], (ptrdiff_t)strides[i], channels};
#ifdef AVX2
        if (!plain && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) {
            done[i] = (uint8_t)read_tile_avx2(plan, data[i], size, start, &room, &place);
            continue;
        }
#endif
        done[i] = (uint8_t)read_tile_any(plan, data[i], size, start, &room, &place);
    }
    free(room.bytes);
    free(room.samples);
    free(plan);
}

#if !defined(_WIN32)

#define RUN_BYTES (8 << 20) /* as much as is read in one piece */

struct span {
    int64_t offset, size, number;
};

static int by_offset(const void *one, const void *other)
{
    const int64_t a = ((const struct span *)one)->offset, b = ((const struct span *)other)->offset;
    return (a > b) - (a < b);
}

static int read_all(int descriptor, uint8_t *to, int64_t size, int64_t offset)
{
    while (size > 0) {
        ssize_t got = pread(descriptor, to, (size_t)size, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 0;
        to += got, size -= got, offset += got;
    }
    return 1;
}

static int64_t nanoseconds(clockid_t clock)
{
    struct timespec now = {0};
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Reads tiles out of a file and decodes them. offsets and sizes: where their streams lie, tiles of size 0 are not there;
 * the caller bounds the sizes. What lies side by side is read at once. spent: nanoseconds of reading, on the clock and of
 * the processor. All else as in wsi_jpeg_decode. Returns how often was read, -1 where there is no memory; a tile that could
 * not be read is not done, and the caller, who tries again, learns why. */
EXPORT int64_t wsi_jpeg_read(int descriptor, int64_t count, const int64_t *offsets, const int64_t *sizes,
                             uint8_t *const *pixels, const int64_t *strides, uint8_t *done, const uint8_t *tables,
                             int64_t tables_size, int width, int height, int components, int ycbcr, int reduce,
                             int channels, int plain, int64_t *spent)
{
    const int64_t clock = nanoseconds(CLOCK_MONOTONIC), processor = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    int64_t total = 0, present = 0, requests = 0;
    for (int64_t i = 0; i < count; i++) {
        done[i] = 0;
        if (sizes[i] > 0 && offsets[i] > 0) total += sizes[i], present++;
    }
    spent[0] = spent[1] = 0;
    if (!present) return 0;
    struct span *spans = malloc((size_t)present * sizeof *spans);
    uint8_t *bytes = malloc((size_t)total);
    const uint8_t **data = calloc((size_t)count, sizeof *data);
    int64_t *lengths = calloc((size_t)count, sizeof *lengths);
    if (spans && bytes && data && lengths) {
        int64_t n = 0;
        for (int64_t i = 0; i < count; i++)
            if (sizes[i] > 0 && offsets[i] > 0) spans[n++] = (struct span){offsets[i], sizes[i], i};
        qsort(spans, (size_t)present, sizeof *spans, by_offset);
        uint8_t *at = bytes;
        for (int64_t first = 0, next; first < present; first = next) {
            int64_t length = spans[first].size;
            for (next = first + 1; next < present && spans[next].offset == spans[first].offset + length &&
                                   length + spans[next].size <= RUN_BYTES;
                 next++)
                length += spans[next].size;
            requests++;
            if (read_all(descriptor, at, length, spans[first].offset)) {
                for (int64_t i = first; i < next; i++) {
                    data[spans[i].number] = at + (spans[i].offset - spans[first].offset);
                    lengths[spans[i].number] = spans[i].size;
                }
                at += length;
            }
        }
        spent[0] = nanoseconds(CLOCK_MONOTONIC) - clock;
        spent[1] = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - processor;
        wsi_jpeg_decode(count, data, lengths, pixels, strides, done, tables, tables_size, width, height, components,
                        ycbcr, reduce, channels, plain);
    } else {
        requests = -1;
    }
    free(lengths);
    free(data);
    free(bytes);
    free(spans);
    return requests;
}

#endif

#else

EXPORT void wsi_jpeg_decode(int64_t count, const uint8_t *const *data, const int64_t *sizes, uint8_t *const *pixels,
                            const int64_t *strides, uint8_t *done, const uint8_t *tables, int64_t tables_size, int width,
                            int height, int components, int ycbcr, int reduce, int channels, int plain)
{
    for (int64_t i = 0; i < count; i++) done[i] = 0;
}

#endif
