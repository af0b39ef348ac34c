/* Every sum over the pairs of one row in one pass; pair_sums.py says what they are. */
#include "row.h"

enum { MASS, PLOGP, SQUARE, SCORES, MAX_SCORE, PC, PPC, PCC, PPCC, MIN_C, C_, CC, EE, EC, FAR };

static inline __attribute__((always_inline)) void row(float *restrict s, const float *restrict b, long columns,
                                                      float shift, float centre, float share, float place,
                                                      float *restrict usage, float *restrict out, long stride,
                                                      const int what) {
    float mass = 0, plogp = 0, square = 0, scores = 0, top = -LARGEST, pc = 0, ppc = 0, pcc = 0, ppcc = 0, low = LARGEST;
    float sum = 0, cc = 0, ee = 0, ec = 0, far = 0;
    int bad = 0;
#pragma omp simd reduction(+ : mass, plogp, square, scores, pc, ppc, pcc, ppcc, sum, cc, ee, ec, far) \
    reduction(max : top) reduction(min : low) reduction(| : bad)
    for (long j = 0; j < columns; j++) {
        float score = s[j], x = score - shift, near = between(-127.0f, x, 128.0f), p = power(near);
        int hidden = (what & MASKED) && score < HIDDEN;
        usage[j] += p;
        mass += p;
        square += p * p;
        scores += hidden ? 0.0f : score;
        plogp += p * near;
        top = score > top ? score : top;
        bad |= score != score;
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
    if (bad) top = NAN; /* a comparison loses it */
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

void attnprobe_row(float *s, const float *b, long columns, float shift, float centre, float share, float place,
                   float *usage, float *out, long stride, long what) {
#define VARIANT(W)                                                              \
    case W:                                                                     \
        row(s, b, columns, shift, centre, share, place, usage, out, stride, W); \
        break;
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
}
