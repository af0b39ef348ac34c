/* Every sum over the pairs of a tile in one pass; pair_sums.py says what they are. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define HIDDEN -1e29f /* below it, a pair is masked */
#define LARGEST 1e30f
#define STRIP 1024 /* columns whose usage is kept on the stack */

enum { ERROR = 1, EXTENDED = 2, MASKED = 4 };
enum { MASS, PLOGP, SQUARE, SCORES, MAX_SCORE, PC, PPC, PCC, PPCC, MIN_C, C_, CC, EE, EC, FAR, ROWS };

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

static inline __attribute__((always_inline)) void row(float *restrict s, const float *restrict b, long columns,
                                                      float shift, float centre, float share, float place,
                                                      float *restrict usage, float *restrict out, long stride,
                                                      const int what) {
    float mass = 0, plogp = 0, square = 0, scores = 0, top = -LARGEST, pc = 0, ppc = 0, pcc = 0, ppcc = 0, low = LARGEST;
    float sum = 0, cc = 0, ee = 0, ec = 0, far = 0;
#pragma omp simd reduction(+ : mass, plogp, square, scores, pc, ppc, pcc, ppcc, sum, cc, ee, ec, far) \
    reduction(max : top) reduction(min : low)
    for (long j = 0; j < columns; j++) {
        float score = s[j], x = score - shift, near = x < -127.0f ? -127.0f : 128.0f < x ? 128.0f : x, p = power(near);
        int hidden = (what & MASKED) && score < HIDDEN;
        usage[j] += p;
        mass += p;
        square += p * p;
        scores += hidden ? 0.0f : score;
        plogp += p * near;
        top = score > top ? score : top;
        if (what & ERROR) {
            float c = hidden ? 0.0f : b[j] - centre, w = p * c, lowest = hidden ? LARGEST : c;
            pc += w;
            ppc += w * p;
            pcc += w * c;
            ppcc += w * w;
            low = lowest < low ? lowest : low;
            if (what & EXTENDED) {
                float e = hidden ? 0.0f : p - share;
                sum += c;
                cc += c * c;
                ee += e * e;
                ec += e * c;
            }
        }
        if (what & EXTENDED) {
            far += p * fabsf(place - (float)j);
            s[j] = p;
        }
    }
    if (mass != mass) top = mass; /* a comparison loses NaN */
    if (pc != pc) low = pc;
    out[MASS * stride] += mass;
    out[PLOGP * stride] += plogp;
    out[SQUARE * stride] += square;
    out[SCORES * stride] += scores;
    float before = out[MAX_SCORE * stride];
    out[MAX_SCORE * stride] = top > before || top != top ? top : before;
    if (what & ERROR) {
        out[PC * stride] += pc;
        out[PPC * stride] += ppc;
        out[PCC * stride] += pcc;
        out[PPCC * stride] += ppcc;
        before = out[MIN_C * stride];
        out[MIN_C * stride] = low < before || low != low ? low : before;
    }
    if (what & EXTENDED) {
        out[C_ * stride] += sum;
        out[CC * stride] += cc;
        out[EE * stride] += ee;
        out[EC * stride] += ec;
        out[FAR * stride] += far;
    }
}

#define VARIANT(W)                                                                                                  \
    case W:                                                                                                         \
        row(s, b, width, shift[i], centre[i], share[i], place[i] - (float)(first + j), strip, out + i, stride, W);  \
        break;

/* A tile [items, rows, columns] of scores and compatibilities, whose first column is key number `first`. Arrays over
   rows are at the tile's first row, `length` apart between items; `sums` is [ROWS, *], `stride` apart; `usage` is at
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
                switch (what) {
                    VARIANT(0)
                    VARIANT(ERROR)
                    VARIANT(EXTENDED)
                    VARIANT(ERROR | EXTENDED)
                    VARIANT(MASKED)
                    VARIANT(MASKED | ERROR)
                    VARIANT(MASKED | EXTENDED)
                    VARIANT(MASKED | ERROR | EXTENDED)
                }
                if (what & EXTENDED)
                    for (long k = width; k < whole; k++) s[k] = 0;
            }
            for (long k = 0; k < whole; k++) usage[n * keys + j + k] += strip[k];
        }
    }
}

/* Of vectors [items, rows, width] times the item's factor: a copy, their lengths, and their products with others; and
   the others' lengths. What is not wanted is null; without a copy there are only lengths. Strides are those of items
   and rows; what is one for each row is [items, *], `apart`. */
void attnprobe_vectors(const float *vectors, long items, long rows, long width, long item, long row, const float *factors,
                       const float *others, long other_item, long other_row, float *copy, float *length, float *product,
                       float *other_length, long apart) {
    for (long n = 0; n < items; n++)
        for (long i = 0; i < rows; i++) {
            const float *x = vectors + n * item + i * row, *y = others ? others + n * other_item + i * other_row : x;
            float squares = 0, products = 0, other_squares = 0;
            if (copy) {
                float *to = copy + (n * rows + i) * width, factor = factors[n];
#pragma omp simd reduction(+ : squares, products, other_squares)
                for (long k = 0; k < width; k++) {
                    float v = x[k] * factor;
                    to[k] = v;
                    squares += v * v;
                    products += v * y[k];
                    other_squares += y[k] * y[k];
                }
            } else {
#pragma omp simd reduction(+ : squares)
                for (long k = 0; k < width; k++) squares += x[k] * x[k];
            }
            length[n * apart + i] = sqrtf(squares);
            if (copy) product[n * apart + i] = products;
            if (other_length) other_length[n * apart + i] = sqrtf(other_squares);
        }
}

/* The largest absolute value of each item; NaN is larger than Inf. */
void attnprobe_largest(const float *vectors, long items, long rows, long width, long item, long row, float *largest) {
    for (long n = 0; n < items; n++) {
        int32_t top = 0;
        for (long i = 0; i < rows; i++) {
            const float *x = vectors + n * item + i * row;
#pragma omp simd reduction(max : top)
            for (long k = 0; k < width; k++) {
                int32_t bits;
                memcpy(&bits, x + k, 4);
                bits &= 0x7fffffff;
                top = bits > top ? bits : top;
            }
        }
        memcpy(largest + n, &top, 4);
    }
}
