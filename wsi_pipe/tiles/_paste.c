/* Copies decoded blocks into the tiles that they touch: a whole group of tiles in one call, without Python's lock. A block
 * lies anywhere over its tile; what is beyond the tile is left out. All pixels are RGB, 3 bytes. */

#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define WHITE 255

EXPORT int wsi_paste_abi(void) { return 1; }

/* Pastes `count` blocks. blocks: address, width and height of each, rows side by side; address 0 for a block that is
 * missing, which is white. places: (x, y) of its corner in its tile. numbers: the tile. tiles: `tile_count` of `width` x
 * `height` px, one after the other. Returns 0, or -1, with nothing done, where a number is none of a tile. */
EXPORT int wsi_paste(int64_t count, const int64_t *blocks, const int64_t *places, const int64_t *numbers, uint8_t *tiles,
                     int64_t tile_count, int64_t width, int64_t height)
{
    for (int64_t i = 0; i < count; i++)
        if (numbers[i] < 0 || numbers[i] >= tile_count) return -1;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *block = (const uint8_t *)(intptr_t)blocks[3 * i];
        const int64_t wide = blocks[3 * i + 1], high = blocks[3 * i + 2], left = places[2 * i], top = places[2 * i + 1];
        const int64_t x0 = left > 0 ? left : 0, x1 = left + wide < width ? left + wide : width;
        const int64_t y0 = top > 0 ? top : 0, y1 = top + high < height ? top + high : height;
        if (x0 >= x1) continue;
        uint8_t *tile = tiles + numbers[i] * width * height * 3;
        const size_t length = (size_t)(x1 - x0) * 3;
        for (int64_t y = y0; y < y1; y++) {
            uint8_t *to = tile + (y * width + x0) * 3;
            if (block) memcpy(to, block + ((y - top) * wide + x0 - left) * 3, length);
            else memset(to, WHITE, length);
        }
    }
    return 0;
}
