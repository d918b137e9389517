// Products of a few rows with the matrices of their experts: weights are read once, in order.
//
//   out[r, o] = bias[e, o] + sum over i of x[r, i] weight[e, o, i], for the rows r of expert e
//
// Values are float32 with -DFLOAT32, else bfloat16: the upper half of a float. A vector of those becomes two
// of floats, of the values at even and at odd places, by a shift and a mask; rows of x are widened in the same
// order once, and stay in the cache while the matrix passes by. Sums are float32, rounded once. GCC's vector
// types, which Clang has too, serve every processor.

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define TILE_OUTPUTS (LANES / 4)  // with MOST_TILE_ROWS: sums that fit into registers

enum {
    STEP = 2 * LANES,  // values at a time
    MOST_TILE_ROWS = 4,
    BLOCK_ROWS = 32,     // of x, widened at a time
    BLOCK_OUTPUTS = 32,  // in what a thread takes next
    AHEAD_BYTES = 512,   // between what is read and what is fetched
    LINE_BYTES = 64,
    ROWS_OFFSET = LINE_BYTES,
};

#if !defined(__clang__) && __GNUC__ < 12
#define __builtin_shufflevector(a, b, ...) __builtin_shuffle(a, b, (pairs){__VA_ARGS__})
#endif

typedef uint32_t pairs __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#ifdef FLOAT32

typedef float value;
typedef floats results;
typedef struct {
    floats first, second;
} values;

static inline values load(const value *from) {
    return (values){*(const floats *)from, *(const floats *)(from + LANES)};
}
static inline floats first(values v) { return v.first; }
static inline floats second(values v) { return v.second; }
static inline results rounded(floats sums) { return sums; }
static inline float widened(value one) { return one; }

#else

typedef uint16_t value;
typedef value results __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef pairs values;

static inline values load(const value *from) { return *(const pairs *)from; }
static inline floats first(values v) { return (floats)(v << 16); }
static inline floats second(values v) { return (floats)(v & 0xffff0000u); }

static inline float widened(value one) {
    uint32_t bits = (uint32_t)one << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// To the nearest, halves to even; what is not a number stays so.
static inline results rounded(floats sums) {
    pairs bits = (pairs)sums;
    pairs nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    pairs none = bits >> 16 | 0x40, is_none = (pairs)((bits & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector((none & is_none) | (nearest & ~is_none), results);
}

#endif

// The last values of a row, filled up with zeros.
static inline values load_last(const value *from, ptrdiff_t count) {
    value filled[STEP] = {0};
    memcpy(filled, from, (size_t)count * sizeof *from);
    return load(filled);
}

static void widen(const value *x, ptrdiff_t size, float *wide) {
    for (ptrdiff_t i = 0; i < size; i += STEP, wide += STEP) {
        values v = size - i < STEP ? load_last(x + i, size - i) : load(x + i);
        *(floats *)wide = first(v);
        *(floats *)(wide + LANES) = second(v);
    }
}

// Of every block of 2n places, the sums of a's halves in the first n, of b's in the others.
#if LANES == 16
static inline floats merge_8(floats a, floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
         + __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
static inline floats merge_4(floats a, floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
         + __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}
static inline floats merge_2(floats a, floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
         + __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
static inline floats merge_1(floats a, floats b) {
    return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
         + __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
#else
static inline floats merge_4(floats a, floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
         + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
static inline floats merge_2(floats a, floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
         + __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
static inline floats merge_1(floats a, floats b) {
    return __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14)
         + __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
}
#endif

// In place i, the sum of vector i: vectors whose numbers differ in one bit are merged, bit by bit.
static inline floats sums_of(floats *vectors) {
#if LANES == 16
    for (int i = 0; i < 8; i++) vectors[i] = merge_8(vectors[i], vectors[i + 8]);
#endif
    for (int i = 0; i < 4; i++) vectors[i] = merge_4(vectors[i], vectors[i + 4]);
    for (int i = 0; i < 2; i++) vectors[i] = merge_2(vectors[i], vectors[i + 2]);
    return merge_1(vectors[0], vectors[1]);
}

enum { AHEAD = AHEAD_BYTES / sizeof(value) };

// Between rows that were widened: one line of the cache more than they take, so that no two share a set of it.
static inline ptrdiff_t wide_stride_of(ptrdiff_t inner) {
    return (inner + STEP - 1) / STEP * STEP + LINE_BYTES / (ptrdiff_t)sizeof(float);
}

#define UNROLL _Pragma("GCC unroll 8")
#define ADD_PRODUCTS(LOAD)                                                                            \
    do {                                                                                              \
        floats low[OUTPUTS], high[OUTPUTS];                                                           \
        UNROLL for (int o = 0; o < OUTPUTS; o++) {                                                    \
            const value *row = weight + o * weight_stride + i;                                     \
            values v = LOAD;                                                                          \
            low[o] = first(v), high[o] = second(v);                                                   \
        }                                                                                             \
        UNROLL for (int r = 0; r < ROWS; r++) {                                                       \
            floats a = *(const floats *)(x + r * x_stride + i);                                       \
            floats b = *(const floats *)(x + r * x_stride + i + LANES);                               \
            UNROLL for (int o = 0; o < OUTPUTS; o++) sum[r][o] += a * low[o], sum[r][o] += b * high[o]; \
        }                                                                                             \
    } while (0)

// ROWS x OUTPUTS sums at once, in registers.
#define DEFINE_TILE(NAME, R, O)                                                                       \
    static void NAME(const float *restrict x, ptrdiff_t x_stride, const value *restrict weight,    \
                     ptrdiff_t weight_stride, const value *bias, value *restrict out,                 \
                     ptrdiff_t out_stride, ptrdiff_t inner) {                                                               \
        enum { ROWS = R, OUTPUTS = O };                                                               \
        floats sum[ROWS][OUTPUTS] = {0};                                                              \
        UNROLL for (int r = 0; r < ROWS; r++)                                                         \
            UNROLL for (int o = 0; o < OUTPUTS; o++) sum[r][o][0] = bias ? widened(bias[o]) : 0;      \
        ptrdiff_t i = 0, ahead = AHEAD;                                                               \
        for (; i + STEP <= inner; i += STEP) {                                                        \
            if (i + AHEAD >= inner) ahead = AHEAD + OUTPUTS * weight_stride - inner; /* the next rows */ \
            ADD_PRODUCTS((__builtin_prefetch(row + ahead), load(row)));                               \
        }                                                                                             \
        if (i < inner) ADD_PRODUCTS(load_last(row, inner - i));                                            \
        enum { PADDED = (ROWS * OUTPUTS + LANES - 1) / LANES * LANES };                               \
        floats sums[PADDED] = {0};                                                                    \
        value rounded_sums[PADDED];                                                                     \
        UNROLL for (int r = 0; r < ROWS; r++)                                                         \
            UNROLL for (int o = 0; o < OUTPUTS; o++) sums[r * OUTPUTS + o] = sum[r][o];               \
        UNROLL for (int n = 0; n < PADDED; n += LANES) *(results *)(rounded_sums + n) = rounded(sums_of(sums + n)); \
        UNROLL for (int r = 0; r < ROWS; r++)                                                         \
            memcpy(out + r * out_stride, rounded_sums + r * OUTPUTS, OUTPUTS * sizeof *out);               \
    }

DEFINE_TILE(row_1, 1, 1)
DEFINE_TILE(rows_2, 2, 1)
DEFINE_TILE(rows_3, 3, 1)
DEFINE_TILE(rows_4, 4, 1)
DEFINE_TILE(wide_row_1, 1, TILE_OUTPUTS)
DEFINE_TILE(wide_rows_2, 2, TILE_OUTPUTS)
DEFINE_TILE(wide_rows_3, 3, TILE_OUTPUTS)
DEFINE_TILE(wide_rows_4, 4, TILE_OUTPUTS)

typedef void tile(const float *, ptrdiff_t, const value *, ptrdiff_t, const value *, value *, ptrdiff_t,
                  ptrdiff_t);
static tile *const tiles[2][MOST_TILE_ROWS] = {
    {row_1, rows_2, rows_3, rows_4},
    {wide_row_1, wide_rows_2, wide_rows_3, wide_rows_4},
};

static void block(const float *x, ptrdiff_t rows, const value *weight, ptrdiff_t weight_stride,
                  const value *bias, ptrdiff_t outputs, value *out, ptrdiff_t out_stride, ptrdiff_t inner) {
    ptrdiff_t x_stride = wide_stride_of(inner);
    for (ptrdiff_t o = 0; o < outputs;) {
        int is_wide = outputs - o >= TILE_OUTPUTS;
        for (ptrdiff_t r = 0; r < rows; r += MOST_TILE_ROWS) {
            ptrdiff_t count = rows - r < MOST_TILE_ROWS ? rows - r : MOST_TILE_ROWS;
            tiles[is_wide][count - 1](x + r * x_stride, x_stride, weight + o * weight_stride, weight_stride,
                                      bias ? bias + o : bias, out + r * out_stride + o, out_stride, inner);
        }
        o += is_wide ? TILE_OUTPUTS : 1;
    }
}

// Memory of this thread, kept from call to call: fresh pages would cost more than the products.
static pthread_key_t memory_key;
static pthread_once_t memory_once = PTHREAD_ONCE_INIT;

static void make_memory_key(void) { pthread_key_create(&memory_key, free); }

static float *widened_rows(size_t count) {
    pthread_once(&memory_once, make_memory_key);
    size_t *memory = pthread_getspecific(memory_key);  // its size, then the rows
    if (!memory || *memory < count) {
        free(memory);
        memory = malloc(ROWS_OFFSET + count * sizeof(float));
        if (memory) *memory = count;
        pthread_setspecific(memory_key, memory);
    }
    return memory ? (float *)((char *)memory + ROWS_OFFSET) : NULL;
}

struct part {
    int64_t expert, first_row, rows;
};

// Strides in values; values of a row lie side by side. Parts: at most BLOCK_ROWS rows of an expert each.
// Returns 0, or 1 if there was no memory for the rows.
int moe_runtime_grouped_rows(const value *x, int64_t x_stride, const value *weight, int64_t expert_stride,
                             int64_t weight_stride, const value *bias, int64_t bias_stride, value *out,
                             int64_t out_stride, const struct part *parts, int64_t num_parts, int64_t outputs,
                             int64_t inner, int32_t threads) {
    int64_t blocks = (outputs + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS;
    ptrdiff_t wide_stride = wide_stride_of(inner);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *wide = widened_rows((size_t)(BLOCK_ROWS * wide_stride));
        int64_t widened = -1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_parts * blocks; task++) {
            struct part part = parts[task / blocks];
            int64_t first = task % blocks * BLOCK_OUTPUTS;
            int64_t count = outputs - first < BLOCK_OUTPUTS ? outputs - first : BLOCK_OUTPUTS;
            if (!wide) {
                failed = 1;
                continue;
            }
            if (widened != task / blocks)
                for (int64_t r = 0; r < part.rows; r++)
                    widen(x + (part.first_row + r) * x_stride, inner, wide + r * wide_stride);
            widened = task / blocks;
            block(wide, part.rows, weight + part.expert * expert_stride + first * weight_stride, weight_stride,
                  bias ? bias + part.expert * bias_stride + first : bias, count,
                  out + part.first_row * out_stride + first, out_stride, inner);
        }
    }
    return failed;
}
