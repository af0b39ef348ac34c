/* The pairs of a tile that somebody else has computed. */
#include "row.h"

#define STRIP 1024 /* columns whose usage is kept on the stack */

/* A tile [items, rows, columns] of scores and compatibilities, whose first column is key number `first`. Arrays over
   rows are at the tile's first row, `length` apart between items; `sums` is [sums, *], `stride` apart; `usage` is at
   the tile's first column, `keys` apart between items. A row sees the keys before its `limit`, and does not count where
   its shift is LARGEST. Where EXTENDED, `scores` become the weights. */
void attnprobe_tile(float *scores, const float *compatibilities, long items, long rows, long columns, long first,
                    const int32_t *limits, const float *shifts, const float *centres, const float *shares,
                    const float *places, long length, float *sums, long stride, float *usage, long keys, long what) {
    float strip[STRIP];
    for (long n = 0; n < items; n++) {
        const int32_t *limit = limits + n * length;
        const float *shift = shifts + n * length, *centre = centres + n * length;
        const float *share = shares + n * length, *place = places + n * length;
        float *out = sums + n * length;
        for (long j = 0; j < columns; j += STRIP) {
            long whole = columns - j < STRIP ? columns - j : STRIP;
            memset(strip, 0, sizeof strip);
            for (long i = 0; i < rows; i++) {
                long at = (n * rows + i) * columns + j, width = limit[i] - first - j;
                width = width < 0 || shift[i] >= LARGEST ? 0 : width < whole ? width : whole;
                float *s = scores + at;
                const float *b = compatibilities ? compatibilities + at : s;
                attnprobe_row(s, b, width, shift[i], centre[i], share[i], place[i] - (float)(first + j), strip, out + i,
                              stride, what);
                if (what & EXTENDED)
                    for (long k = width; k < whole; k++) s[k] = 0;
            }
            for (long k = 0; k < whole; k++) usage[n * keys + j + k] += strip[k];
        }
    }
}
