/* All pairs of some items, a few rows and columns at a time: scores and compatibilities never leave the caches. */
#include "describe.h"
#include "product.h"
#include "row.h"

#define ROWS 8    /* a multiple of HEIGHT */
#define WIDTH 512 /* a multiple of PANEL */

/* What one thread needs. */
typedef struct {
    float *key, *value, *gradient, *query, *error, *scores, *compatibilities, *usage, *readers, *uniform;
} Scratch;

static long rounded(long number, long step) { return (number + step - 1) / step * step; }

static long divided(const Call *call, float *room, Scratch *scratch) {
    long width = rounded(call->width, HEIGHT), used = 0;
    const long sizes[] = {WIDTH * call->depth, WIDTH * call->width, WIDTH * width, ROWS * call->depth, ROWS * width,
                          ROWS * WIDTH,        ROWS * WIDTH,        WIDTH,         WIDTH,              WIDTH};
    float **parts = (float **)scratch;
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; used += rounded(sizes[i++], 16))
        if (room) parts[i] = room + used;
    return used;
}

/* What a call takes, to be compared with what is handed over. */
long attnprobe_size(void) { return sizeof(Call); }

/* Floats that `attnprobe_sweep` and `attnprobe_log_sum_exp` need for themselves. */
long attnprobe_room(const Call *call) { return divided(call, 0, 0); }

/* Rows of vectors times a factor, each `width` long; those that do not count, and those beyond, are 0. */
static void copy_rows(const Heads *x, const Call *call, long n, long top, long rows, long depth, long width,
                      float factor, float *to) {
    const float *vectors = vectors_of(x, n, call->heads) + top * x->row;
    memset(to, 0, sizeof(float) * ROWS * width);
    for (long i = 0; i < rows; i++)
        if (counts(call, n * call->queries + top + i))
            for (long k = 0; k < depth; k++) to[i * width + k] = vectors[i * x->row + k] * factor;
}

static void products(const float *rows, long depth, long stride, const float *panels, long columns, float *out) {
    for (long r = 0; r < ROWS; r += HEIGHT)
        for (long c = 0; c < columns; c += PANEL)
            product(rows + r * stride, stride, 1, panels + c * depth, PANEL, depth, out + r * WIDTH + c, WIDTH, 0);
}

static float score_of(const float *query, const float *key, long depth, float factor) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long k = 0; k < depth; k++) sum += query[k] * factor * key[k];
    return sum;
}

/* Whether a mask hides a pair, counted from the mask's first of the item. */
static inline int masked(const Call *call, long at) {
    return call->visible ? !call->visible[at] : call->bias && call->bias[at] <= call->threshold;
}

static long mask_of(const Call *call, long n) {
    return n / call->heads * call->mask_batch + n % call->heads * call->mask_head;
}

/* How many of `whole` columns from number `first` on are before the limit of a row. */
static long before_limit(const Call *call, long row, long first, long whole) {
    long width = call->limit[row] - first;
    return width < 0 ? 0 : width < whole ? width : whole;
}

/* How many of `whole` columns from number `first` on are enough for all that rows from `top` on see. */
static long reach(const Call *call, long n, long top, long rows, long first, long whole) {
    long reached = 0;
    for (long i = top; i < top + rows; i++) {
        long at = n * call->queries + i, width = counts(call, at) ? before_limit(call, at, first, whole) : 0;
        while (width > reached && masked(call, mask_of(call, n) + i * call->mask_row + first + width - 1)) width--;
        reached = width > reached ? width : reached;
    }
    return reached;
}

/* Scores of one row, with what its mask adds and hides. */
static void mask_row(const Call *call, long at, long columns, float *scores) {
    if (call->visible)
        for (long j = 0; j < columns; j++) scores[j] = call->visible[at + j] ? scores[j] : -LARGEST;
    else if (call->bias)
        for (long j = 0; j < columns; j++) {
            float bias = call->bias[at + j], sum = scores[j] + bias * 1.44269504f;
            scores[j] = bias <= call->threshold || sum <= -LARGEST ? -LARGEST : sum;
        }
}

/* Scores of rows `top` to `top + rows` of item n and as many of the columns `first` to `first + whole`, whose keys are
   in `room`, as they may see: how many that is. Masks come later. */
static long score_block(const Call *call, long n, long top, long rows, long first, long whole, const Scratch *room) {
    long columns = reach(call, n, top, rows, first, whole);
    if (!columns) return 0;
    copy_rows(&call->query, call, n, top, rows, call->depth, call->depth, (float)call->factor, room->query);
    products(room->query, call->depth, call->depth, room->key, columns, room->scores);
    return columns;
}

/* All sums over such a block. */
static void add_block(const Call *call, long n, long top, long rows, long first, long whole, const Scratch *room,
                      long what) {
    long columns = score_block(call, n, top, rows, first, whole, room), wide = rounded(call->width, HEIGHT);
    if (!columns) return;
    if (what & ERROR) {
        copy_rows(&call->error, call, n, top, rows, call->width, wide, (float)call->unit[n], room->error);
        products(room->error, call->width, wide, room->value, columns, room->compatibilities);
    }
    for (long r = 0; r < ROWS; r++) {
        long at = n * call->queries + top + r, width = 0, place = 0;
        float *s = room->scores + r * WIDTH;
        if (r < rows && counts(call, at)) {
            width = before_limit(call, at, first, columns);
            place = (long)call->place[at] - first;
        }
        if (width > 0) {
            long mask = mask_of(call, n) + (top + r) * call->mask_row + first, sink = call->first_key[n] - first;
            if (what & MASKED) {
                mask_row(call, mask, width, s);
                for (long j = 0; j < width; j++) {
                    float seen = s[j] < HIDDEN ? 0 : 1;
                    room->readers[j] += seen;
                    room->uniform[j] += seen * call->share[at];
                }
            }
            if (0 <= sink && sink < width) call->sink_score[at] = s[sink];
            if (call->self_score && 0 <= place && place < width) call->self_score[at] = s[place];
            attnprobe_row(s, room->compatibilities + r * WIDTH, width, call->shift[at], call->centre[at],
                          call->share[at], call->place[at] - (float)first, room->usage, call->sums + at, call->stride,
                          what & (ERROR | EXTENDED | MASKED));
        }
        if (what & EXTENDED) memset(s + width, 0, sizeof(float) * (rounded(columns, PANEL) - width));
    }
    if (call->value_gradient && what & EXTENDED && what & ERROR)
        for (long c = 0; c < columns; c += PANEL)
            for (long e = 0; e < wide; e += HEIGHT)
                product(room->error + e, 1, wide, room->scores + c, WIDTH, ROWS, room->gradient + c * wide + e * PANEL,
                        PANEL, 1);
}

static void add_strip(const Call *call, long n, long first, const Scratch *room, long what) {
    long whole = call->keys - first < WIDTH ? call->keys - first : WIDTH, wide = rounded(call->width, HEIGHT);
    const float *key = vectors_of(&call->key, n, call->heads), *value = vectors_of(&call->value, n, call->heads);
    pack(key + first * call->key.row, call->key.row, whole, call->depth, room->key);
    if (what & ERROR) pack(value + first * call->value.row, call->value.row, whole, call->width, room->value);
    memset(room->usage, 0, sizeof(float) * WIDTH);
    memset(room->readers, 0, sizeof(float) * WIDTH);
    memset(room->uniform, 0, sizeof(float) * WIDTH);
    long size = rounded(whole, PANEL) * wide;
    if (call->value_gradient) memset(room->gradient, 0, sizeof(float) * size);
    for (long top = 0; top < call->queries; top += ROWS)
        add_block(call, n, top, call->queries - top < ROWS ? call->queries - top : ROWS, first, whole, room, what);
    for (long j = 0, at = n * call->keys + first; j < whole; j++, at++) {
        call->usage[at] = room->usage[j];
        if (what & MASKED) call->readers[at] = room->readers[j], call->uniform[at] = room->uniform[j];
    }
    if (call->value_gradient) {
        double squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long k = 0; k < size; k++) squares += (double)room->gradient[k] * room->gradient[k];
        call->value_gradient[n] += squares;
    }
}

/* All sums of the items from number `item` up to `end`. */
void attnprobe_sweep(const Call *call, long item, long end, float *room, long what) {
    Scratch scratch;
    divided(call, room, &scratch);
    for (long n = item; n < end; n++) {
        describe(call, n);
        for (long first = 0; first < call->keys; first += WIDTH) add_strip(call, n, first, &scratch, what);
    }
}

/* What needs no pairs. */
void attnprobe_describe(const Call *call, long item, long end, float *room, long what) {
    (void)room, (void)what;
    for (long n = item; n < end; n++) describe(call, n);
}

/* Two scores of each row: that of the first key that counts, and that of its own. */
void attnprobe_landmarks(const Call *call, long item, long end, float *room, long what) {
    (void)room, (void)what;
    for (long n = item; n < end; n++) {
        const float *query = vectors_of(&call->query, n, call->heads), *keys = vectors_of(&call->key, n, call->heads);
        for (long i = 0; i < call->queries; i++, query += call->query.row) {
            long at = n * call->queries + i, first = call->first_key[n], own = (long)call->place[at];
            if (first < call->limit[at])
                call->sink_score[at] = score_of(query, keys + first * call->key.row, call->depth, (float)call->factor);
            if (call->self_score && own < call->limit[at])
                call->self_score[at] = score_of(query, keys + own * call->key.row, call->depth, (float)call->factor);
        }
    }
}

/* Add the exponentials of one row's scores to their sum, which is over 2^top. */
static void add_exponentials(const float *scores, long columns, float *top, float *total) {
    float most = *top, sum = 0;
#pragma omp simd reduction(max : most)
    for (long j = 0; j < columns; j++) most = scores[j] > most ? scores[j] : most;
#pragma omp simd reduction(+ : sum)
    for (long j = 0; j < columns; j++) sum += power(between(-127.0f, scores[j] - most, 128.0f));
    *total = *total * power(between(-127.0f, *top - most, 128.0f)) + sum;
    *top = most;
}

/* Of each row's scores, the largest, and the sum of the exponentials of what they are less; items as above. */
void attnprobe_log_sum_exp(const Call *call, long item, long end, float *room, long what) {
    Scratch scratch;
    divided(call, room, &scratch);
    for (long n = item; n < end; n++)
        for (long first = 0; first < call->keys; first += WIDTH) {
            long whole = call->keys - first < WIDTH ? call->keys - first : WIDTH;
            const float *key = vectors_of(&call->key, n, call->heads);
            pack(key + first * call->key.row, call->key.row, whole, call->depth, scratch.key);
            for (long top = 0; top < call->queries; top += ROWS) {
                long rows = call->queries - top < ROWS ? call->queries - top : ROWS;
                long columns = score_block(call, n, top, rows, first, whole, &scratch);
                for (long r = 0; r < rows && columns; r++) {
                    long at = n * call->queries + top + r, width = before_limit(call, at, first, columns);
                    float *s = scratch.scores + r * WIDTH;
                    if (what & MASKED) mask_row(call, mask_of(call, n) + (top + r) * call->mask_row + first, width, s);
                    add_exponentials(s, width, call->top + at, call->total + at);
                }
            }
        }
}
