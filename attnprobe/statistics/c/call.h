/* An attention call, as sweep.py describes it. */
#pragma once
#include <stdint.h>

/* Vectors [sequences, heads, rows, width]; each of these heads serves as many of the call's as there are more of them. */
typedef struct {
    const float *data;
    long batch, head, row, heads; /* strides, and their number */
} Heads;

/* Arrays over rows are [N, queries], over columns [N, keys], over items [N], where N = sequences * heads. */
typedef struct {
    long heads, queries, keys, depth, width;
    Heads query, key, value, output, error; /* the last without data if there is none */
    double factor;                          /* on scores */
    const uint8_t *visible;                 /* which pairs, or null */
    const float *bias;                      /* on scores, over ln 2 where not masked, or null */
    long mask_batch, mask_head, mask_row;   /* strides of these two */
    double threshold;                       /* up to which bias a pair is masked */
    const int32_t *limit;                   /* a row sees the keys before it */
    const uint8_t *rows;                    /* which count; null: all */
    const float *shift, *share, *place;     /* of rows */
    const int64_t *first_key;
    float *query_length, *output_length, *error_length, *centre, *sink_score, *self_score;
    float *key_length, *value_length, *usage, *readers, *uniform;
    float *largest, *direction; /* the latter [N, width] */
    double *unit, *value_gradient;
    float *sums; /* [sums, N, queries] */
    long stride; /* N * queries */
    float *top, *total; /* of a row's exponentials */
} Call;

static inline const float *vectors_of(const Heads *x, long n, long heads) {
    return x->data + n / heads * x->batch + n % heads * x->heads / heads * x->head;
}

static inline int counts(const Call *call, long row) { return !call->rows || call->rows[row]; }
