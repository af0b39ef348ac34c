/* Products of a few rows with many columns, from registers and the first cache. */
#pragma once
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define HEIGHT 8 /* rows in registers at a time */
#elif defined(__AVX__)
#define LANES 8
#define HEIGHT 4
#elif defined(__aarch64__)
#define LANES 4
#define HEIGHT 8
#else
#define LANES 4
#define HEIGHT 4
#endif
#define PANEL (2 * LANES) /* columns in registers at a time */

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* out[r, c] = sum over k of left[r * row + k * step] * panel[k * apart + c], for HEIGHT rows and PANEL columns; added
   to what `out` holds, if `more`. */
static inline __attribute__((always_inline)) void product(const float *restrict left, long row, long step,
                                                          const float *restrict panel, long apart, long depth,
                                                          float *restrict out, long width, const int more) {
    Lanes sum[HEIGHT][2];
    for (int r = 0; r < HEIGHT; r++)
        for (int c = 0; c < 2; c++) sum[r][c] = more ? *(const Lanes *)(out + r * width + c * LANES) : (Lanes){0};
    for (long k = 0; k < depth; k++) {
        Lanes first = *(const Lanes *)(panel + k * apart), second = *(const Lanes *)(panel + k * apart + LANES);
        for (int r = 0; r < HEIGHT; r++) {
            sum[r][0] += left[r * row + k * step] * first;
            sum[r][1] += left[r * row + k * step] * second;
        }
    }
    for (int r = 0; r < HEIGHT; r++)
        for (int c = 0; c < 2; c++) *(Lanes *)(out + r * width + c * LANES) = sum[r][c];
}

/* Vectors as panels [depth, PANEL], one after the other; the last is filled up with zeros. */
static void pack(const float *vectors, long stride, long number, long depth, float *panels) {
    for (long j = 0; j < number; j += PANEL, panels += PANEL * depth) {
        long some = number - j < PANEL ? number - j : PANEL;
        if (some < PANEL) memset(panels, 0, sizeof(float) * PANEL * depth);
        for (long k = 0; k < depth; k += LANES) { /* a few cache lines of each vector at a time */
            long end = k + LANES < depth ? k + LANES : depth;
            for (long i = 0; i < some; i++)
                for (long l = k; l < end; l++) panels[l * PANEL + i] = vectors[(j + i) * stride + l];
        }
    }
}
