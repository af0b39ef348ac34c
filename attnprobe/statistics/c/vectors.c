/* Lengths and products of vectors. */
#include <math.h>
#include <stdint.h>
#include <string.h>

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
