/* What the passes over pairs share. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define HIDDEN -1e29f /* below it, a pair is masked */
#define LARGEST 1e30f

_Static_assert(sizeof(long) == 8, "numbers are handed over as 64 bits");

enum { ERROR = 1, EXTENDED = 2, MASKED = 4 };

/* Add one row of pairs to `out`, whose sums are `stride` apart, and its weights to `usage`. `place` is where the query
   stands, counted from the first of the columns. Where EXTENDED, the scores `s` become the weights. */
void attnprobe_row(float *s, const float *b, long columns, float shift, float centre, float share, float place,
                   float *usage, float *out, long stride, long what);

/* 2^x to 2e-7 for x in [-127, 128]; 0 at -127 and Inf at 128, whose exponents are theirs. NaN stays NaN. */
static inline float power(float x) {
    float r = rintf(x), f = x - r;
    float y = 1.32297e-3f;
    y = y * f + 9.66761e-3f;
    y = y * f + 5.550804e-2f;
    y = y * f + 2.4022305e-1f;
    y = y * f + 6.9314695e-1f;
    y = y * f + 1.0f;
    uint32_t bits;
    memcpy(&bits, &y, 4);
    bits += (uint32_t)(int32_t)r << 23;
    memcpy(&y, &bits, 4);
    return y;
}

static inline float between(float low, float x, float high) { return x < low ? low : high < x ? high : x; }
