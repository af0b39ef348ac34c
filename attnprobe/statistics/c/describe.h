/* Lengths of an item's vectors, and what its errors and outputs say of each other. */
#pragma once
#include <math.h>
#include <string.h>

#include "call.h"

#define AHEAD 8

/* Heads are far apart in memory, which no processor foresees. */
static inline void prefetch(const float *x, long width) {
    for (long k = 0; k < width; k += 16) __builtin_prefetch(x + k);
}

static float length_of(const float *x, long width) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long k = 0; k < width; k++) squares += x[k] * x[k];
    return sqrtf(squares);
}

static void lengths(const Heads *x, long n, long heads, long number, long width, float *length) {
    const float *vectors = vectors_of(x, n, heads);
    if (length)
        for (long i = 0; i < number; i++) {
            if (i + AHEAD < number) prefetch(vectors + (i + AHEAD) * x->row, width);
            length[n * number + i] = length_of(vectors + i * x->row, width);
        }
}

/* The largest absolute value; NaN is larger than Inf. */
static float largest(const float *x, long rows, long row, long width) {
    int32_t top = 0;
    for (long i = 0; i < rows; i++) {
        if (i + AHEAD < rows) prefetch(x + (i + AHEAD) * row, width);
#pragma omp simd reduction(max : top)
        for (long k = 0; k < width; k++) {
            int32_t bits;
            memcpy(&bits, x + i * row + k, 4);
            bits &= 0x7fffffff;
            top = bits > top ? bits : top;
        }
    }
    float value;
    memcpy(&value, &top, 4);
    return value;
}

static void describe(const Call *call, long n) {
    lengths(&call->query, n, call->heads, call->queries, call->depth, call->query_length);
    lengths(&call->output, n, call->heads, call->queries, call->width, call->output_length);
    lengths(&call->key, n, call->heads, call->keys, call->depth, call->key_length);
    lengths(&call->value, n, call->heads, call->keys, call->width, call->value_length);
    if (!call->error.data) return;
    const float *error = vectors_of(&call->error, n, call->heads), *output = vectors_of(&call->output, n, call->heads);
    float top = largest(error, call->queries, call->error.row, call->width);
    int exponent = 0; /* NaN, Inf and 0 have none to speak of */
    if (isfinite(top)) frexpf(top, &exponent);
    exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
    float unit = ldexpf(1, -exponent), *direction = call->direction + n * call->width;
    call->largest[n] = top, call->unit[n] = unit;
    for (long i = 0; i < call->queries; i++, error += call->error.row, output += call->output.row) {
        long at = n * call->queries + i;
        if (!counts(call, at)) continue;
        float squares = 0, products = 0;
#pragma omp simd reduction(+ : squares, products)
        for (long k = 0; k < call->width; k++) {
            float u = error[k] * unit;
            squares += u * u;
            products += u * output[k];
        }
        float length = sqrtf(squares), share = length > 0 ? 1 / length : 0;
        call->error_length[at] = length, call->centre[at] = products;
        for (long k = 0; k < call->width; k++) direction[k] += share * (error[k] * unit);
    }
}
