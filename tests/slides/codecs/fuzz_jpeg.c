/* Feeds damaged streams to the JPEG decoder under sanitizers; every buffer has exactly the size that is promised.
 *
 *     gcc -g -O1 -std=gnu11 -fsanitize=address,undefined -fno-sanitize-recover -o /tmp/fuzz_jpeg tests/slides/codecs/fuzz_jpeg.c
 *     /tmp/fuzz_jpeg SEED ROUNDS TILE.jpg...
 *
 * That what is accepted is what libjpeg-turbo gives is tested from Python, in test_fastjpeg.py. */

#include "../../../wsi_pipe/slides/codecs/_jpeg.c"

#include <stdio.h>

static uint64_t state;

static uint32_t chance(uint32_t below)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 33) % below;
}

static size_t damage(uint8_t *data, size_t size)
{
    static const uint8_t marks[] = {0x00, 0xFF, 0xD0, 0xD9, 0xC4, 0xDA};
    size_t at = chance((uint32_t)size), header = size < 700 ? size : 700;
    switch (chance(7)) {
    case 0: break;
    case 1: return at; /* cut short */
    case 2: memmove(data + at, data + at + 1, size - at - 1); return size - 1;
    case 3: data[at] = marks[chance(6)]; break;
    case 4: data[chance((uint32_t)header)] = (uint8_t)chance(256); break;
    case 5:
        for (uint32_t i = chance(40) + 1; i; i--) data[chance((uint32_t)size)] ^= (uint8_t)(1 << chance(8));
        break;
    default: data[at] ^= (uint8_t)(1 << chance(8));
    }
    return size;
}

int main(int argc, char **argv)
{
    if (argc < 4) return 2;
    state = strtoull(argv[1], NULL, 10) * 2654435761u + 88172645463325252u;
    long rounds = atol(argv[2]), accepted = 0;
    for (long i = 0; i < rounds; i++) {
        FILE *file = fopen(argv[3 + chance((uint32_t)(argc - 3))], "rb");
        if (!file) return 2;
        static uint8_t buffer[1 << 20];
        size_t size = fread(buffer, 1, sizeof buffer, file), tables_size = 0;
        fclose(file);
        if (size < 16) continue;
        int width = 0, height = 0, components = 3;
        for (size_t at = 2; at + 10 < size; at += 2 + big16(buffer + at + 2))
            if (buffer[at + 1] >= 0xC0 && buffer[at + 1] <= 0xC2) {
                height = (int)big16(buffer + at + 5), width = (int)big16(buffer + at + 7), components = buffer[at + 9];
                break;
            }
        for (uint32_t times = chance(3); times && size > 1; times--) size = damage(buffer, size);
        /* A size that the header does not state is refused; a header changed to state it must be handled. */
        int reduce = 1 << chance(4), channels = chance(2) ? 3 : components;
        int64_t stride = ((width + reduce - 1) / reduce) * channels, rows = (height + reduce - 1) / reduce, sizes[2];
        uint8_t *data = malloc(size ? size : 1), *out = malloc((size_t)(stride * rows) + 1), done[2];
        uint8_t *tables = malloc(1 + (tables_size = chance(2) ? chance(200) : 0));
        memcpy(data, buffer, size);
        memcpy(tables, buffer + 2, tables_size);
        const uint8_t *datas[2] = {data, data};
        uint8_t *outs[2] = {out, out};
        int64_t strides[2] = {stride, stride};
        sizes[0] = sizes[1] = (int64_t)size;
        wsi_jpeg_decode(2, datas, sizes, outs, strides, done, tables, (int64_t)tables_size, width, height, components,
                        (int)chance(2), reduce, channels, (int)chance(2));
        if (done[0] != done[1]) return 3;
        accepted += done[0];
        free(data), free(out), free(tables);
    }
    printf("%ld rounds, %ld accepted\n", rounds, accepted);
    return 0;
}
