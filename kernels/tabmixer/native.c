/* The TabMixer on CPUs. Rows have nothing to do with each other, so a thread takes a few rows of a
 * network through all of it while they lie in the cache: memory is read and written once. The
 * backward pass computes the forward pass again, random bits included, and keeps nothing.
 *
 * A block of rows is [T, B, D]; features and hidden units are padded with zeros to whole vectors, so
 * that every product is of one kind: vectors of the right factor times numbers of the left one. What
 * the weights of padded features do is multiplied by zero before it reaches anything real.
 *
 * Weight gradients are summed by part, a fixed share of a network's rows: the result does not depend
 * on the number of threads. The second half is included twice, for float and for double.
 */
#ifndef REAL

/* ISO C keeps products and sums apart, and branches for traps that nobody sets. */
#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast", "no-trapping-math", "no-math-errno")
#endif

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "exponential.h"

enum { BYTES = 32, MAX_ROWS = 8, MAX_VECTORS = 2, BLOCK_WIDTH = 256, BLOCK_BYTES = 1 << 18,
       LINEAR_ROWS = 4, LINEAR_BYTES = 64 };

typedef struct {
    int64_t networks, tokens, rows, size, hidden, threshold, with_weights;
} Sizes;

/* The weights of a network; those up to GIVEN are given, in the order of api.Weights. */
enum {
    NORM_WEIGHT, NORM_BIAS, COLUMNS_IN, COLUMNS_IN_BIAS, COLUMNS_OUT, COLUMNS_OUT_BIAS,
    FEATURES_IN, FEATURES_IN_BIAS, FEATURES_OUT, FEATURES_OUT_BIAS, OUT_WEIGHT, OUT_BIAS,
    GIVEN, COLUMNS_IN_TURNED = GIVEN, FEATURES_IN_TURNED, FEATURES_OUT_TURNED, PARTS
};

/* Their shapes, [rows, size] in memory and [rows, padded] in the working space. */
typedef struct {
    int64_t rows[PARTS], size[PARTS], padded[PARTS], given, count;
} Layout;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static Layout layout_of(const Sizes *s, int64_t d, int64_t h) {
    const int64_t t = s->tokens, size = s->size, hidden = s->hidden;
    const int64_t shapes[PARTS][3] = {
        [NORM_WEIGHT] = {1, size, d},
        [NORM_BIAS] = {1, size, d},
        [COLUMNS_IN] = {hidden, t, t},
        [COLUMNS_IN_BIAS] = {1, hidden, hidden},
        [COLUMNS_OUT] = {t, hidden, h},
        [COLUMNS_OUT_BIAS] = {1, t, t},
        [FEATURES_IN] = {size, hidden, h},
        [FEATURES_IN_BIAS] = {1, hidden, h},
        [FEATURES_OUT] = {hidden, size, d},
        [FEATURES_OUT_BIAS] = {1, size, d},
        [OUT_WEIGHT] = {1, size, d},
        [OUT_BIAS] = {1, size, d},
        [COLUMNS_IN_TURNED] = {t, hidden, h},
        [FEATURES_IN_TURNED] = {hidden, size, d},
        [FEATURES_OUT_TURNED] = {size, hidden, h},
    };
    Layout layout = {.given = 0, .count = 0};
    for (int i = 0; i < PARTS; i++) {
        layout.rows[i] = shapes[i][0];
        layout.size[i] = shapes[i][1];
        layout.padded[i] = shapes[i][2];
        layout.count += shapes[i][0] * shapes[i][2];
        if (i < GIVEN) layout.given += shapes[i][0] * shapes[i][1];
    }
    return layout;
}

/* Word i of a seed's random bits (splitmix64); same as reference.random_bytes. */
static inline uint64_t random_word(uint64_t seed, uint64_t i) {
    uint64_t z = seed + i * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline float root_float(float x) { return sqrtf(x); }

static inline double root_double(double x) { return sqrt(x); }

/* The normal distribution function of x, given e = exp(-x^2 / 2); 5e-7 of itself off at most. For
 * x <= 0 it is e / 2 times a polynomial in t, fitted to exp(z^2) erfc(z) / t, z = |x| / sqrt(2). */
static inline float normal_float(float x, float e) {
    const float t = 1.0f / (1.0f + 0.28284271f * fabsf(x));
    float p = 0.05026206f;
    p = p * t - 0.182901219f;
    p = p * t + 0.169085041f;
    p = p * t - 0.0056072101f;
    p = p * t + 0.141431287f;
    p = p * t + 0.168542013f;
    p = p * t + 0.207842693f;
    p = p * t + 0.225669593f;
    p = p * t + 0.225675866f;
    const float tail = 0.5f * e * (p * t);
    return x > 0.0f ? 1.0f - tail : tail;
}

static inline double normal_double(double x, double e) {
    (void)e;
    return 0.5 * erfc(x * -0.70710678118654752440);
}

/* Where the processor fuses products and sums, compilers do, but gcc for some processors not in the
 * narrowest tile: a row would then have other results alone than among others. */
static inline float multiply_add_float(float x, float y, float sum) {
#ifdef FP_FAST_FMAF
    return fmaf(x, y, sum);
#else
    return x * y + sum;
#endif
}

static inline double multiply_add_double(double x, double y, double sum) {
#ifdef FP_FAST_FMA
    return fma(x, y, sum);
#else
    return x * y + sum;
#endif
}

#define REAL float
#define NAME(name) name##_float
#include "native.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_double
#include "native.c"

#else

enum { NAME(LANES) = BYTES / sizeof(REAL) };
#define AT(address) (*(NAME(Vector) *)(address)) /* the vector that begins there */
typedef REAL NAME(Vector) __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

typedef REAL NAME(Half) __attribute__((vector_size(BYTES / 2)));

static inline REAL NAME(total)(NAME(Vector) x) {
    NAME(Half) halves[2];
    memcpy(halves, &x, sizeof halves);
    const NAME(Half) sum = halves[0] + halves[1];
    return sizeof(REAL) == 8 ? sum[0] + sum[1] : (sum[0] + sum[NAME(LANES) / 2 - 2]) + (sum[1] + sum[NAME(LANES) / 2 - 1]);
}

/* c = a b, or c += a b, for `rows` rows and `vectors` vectors of columns; a's element (i, x) lies at
 * a[i * row + x * column]. The constants are known where this is inlined: sums stay in registers. */
static inline __attribute__((always_inline)) void NAME(tile)(
    REAL *restrict c, int64_t ldc, const REAL *restrict a, int64_t row, int64_t column,
    const REAL *restrict b, int64_t ldb, int64_t inner, int add, const int rows,
    const int vectors) {
    NAME(Vector) sums[MAX_ROWS][MAX_VECTORS] = {{{0}}};
    for (int64_t x = 0; x < inner; x++) {
        const NAME(Vector) *right = (const NAME(Vector) *)(b + x * ldb);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sums[i][v] += a[i * row + x * column] * right[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            NAME(Vector) *out = (NAME(Vector) *)(c + i * ldc) + v;
            *out = add ? (NAME(Vector))(*out + sums[i][v]) : sums[i][v];
        }
}

/* The same for one vector of one row. */
static inline void NAME(narrow_tile)(REAL *restrict c, const REAL *restrict a, int64_t column,
                                     const REAL *restrict b, int64_t ldb, int64_t inner, int add) {
    REAL sums[NAME(LANES)] = {0};
    for (int64_t x = 0; x < inner; x++)
        for (int i = 0; i < NAME(LANES); i++)
            sums[i] = NAME(multiply_add)(a[x * column], b[x * ldb + i], sums[i]);
    for (int i = 0; i < NAME(LANES); i++) c[i] = add ? c[i] + sums[i] : sums[i];
}

/* c [m, n] = a [m, inner] b [inner, n], or += with `add`; n is a multiple of the lanes. */
static void NAME(product)(REAL *restrict c, int64_t ldc, const REAL *restrict a, int64_t row,
                          int64_t column, const REAL *restrict b, int64_t ldb, int64_t m,
                          int64_t n, int64_t inner, int add) {
#define TILE(rows, vectors) \
    NAME(tile)(c + i * ldc + j, ldc, a + i * row, row, column, b + j, ldb, inner, add, rows, vectors)
    int64_t j = 0;
    for (; j + 2 * NAME(LANES) <= n; j += 2 * NAME(LANES)) {
        int64_t i = 0;
        for (; i + 6 <= m && i + 8 != m; i += 6) TILE(6, 2);
        for (; i + 4 <= m; i += 4) TILE(4, 2);
        if (m - i == 3) TILE(3, 2);
        if (m - i == 2) TILE(2, 2);
        if (m - i == 1) TILE(1, 2);
    }
    if (j < n) {
        int64_t i = 0;
        for (; i + 8 <= m; i += 8) TILE(8, 1);
        for (; i + 4 <= m; i += 4) TILE(4, 1);
        for (; i < m; i++)
            NAME(narrow_tile)(c + i * ldc + j, a + i * row, column, b + j, ldb, inner, add);
    }
#undef TILE
}

/* Copy rows of `size` numbers between memory and rows of `padded`. */
static inline void NAME(pad)(const REAL *restrict x, int64_t rows, int64_t size, int64_t padded,
                             REAL *restrict out) {
    if (size == padded) {
        memcpy(out, x, (size_t)(rows * size) * sizeof(REAL));
        return;
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < padded; d++)
            out[r * padded + d] = d < size ? x[r * size + d] : 0;
}

/* x as padded rows: itself where it is, else a copy in `space` */
static inline const REAL *NAME(padded)(const REAL *x, int64_t rows, int64_t size, int64_t padded,
                                       REAL *space) {
    if (size == padded) return x;
    NAME(pad)(x, rows, size, padded, space);
    return space;
}

static inline void NAME(unpad)(const REAL *restrict x, int64_t rows, int64_t size, int64_t padded,
                               REAL *restrict out) {
    if (size == padded) {
        memcpy(out, x, (size_t)(rows * size) * sizeof(REAL));
        return;
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < size; d++) out[r * size + d] = x[r * padded + d];
}

/* out [n, m] = x [m, n] */
static inline void NAME(transpose)(const REAL *restrict x, int64_t ldx, int64_t m, int64_t n,
                                   REAL *restrict out, int64_t ldo) {
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < m; i++) out[j * ldo + i] = x[i * ldx + j];
}

/* to = `rows` rows of `size` numbers; they lie `from_stride` and `to_stride` apart */
static void NAME(copy_rows)(const REAL *restrict from, int64_t rows, int64_t from_stride,
                            REAL *restrict to, int64_t to_stride, int64_t size) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t d = 0;
        for (; d + NAME(LANES) <= size; d += NAME(LANES))
            AT(to + r * to_stride + d) = AT(from + r * from_stride + d);
        for (; d < size; d++) to[r * to_stride + d] = from[r * from_stride + d];
    }
}

/* Operations on rows of whole vectors. The usual widths are compiled on their own: a row is then a
 * vector or two, and no loop. */
#define FOR_WIDTH(function, ...)                                              \
    switch (padded) {                                                         \
        case NAME(LANES): function(__VA_ARGS__, NAME(LANES)); break;          \
        case 2 * NAME(LANES): function(__VA_ARGS__, 2 * NAME(LANES)); break;  \
        default: function(__VA_ARGS__, padded);                               \
    }
#define INLINE static inline __attribute__((always_inline))

/* to = each row times `factors`, plus `terms`; the rows of `to` lie `stride` apart */
INLINE void NAME(scale_rows_of)(const REAL *from, const REAL *factors, const REAL *terms,
                                int64_t rows, REAL *to, int64_t stride, const int64_t padded) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v < padded; v += NAME(LANES))
            AT(to + r * stride + v) =
                AT(from + r * padded + v) * AT(factors + v) + AT(terms + v);
}

static void NAME(scale_rows)(const REAL *from, const REAL *factors, const REAL *terms, int64_t rows,
                             REAL *to, int64_t stride, int64_t padded) {
    FOR_WIDTH(NAME(scale_rows_of), from, factors, terms, rows, to, stride)
}

/* to = `row`, `rows` times */
INLINE void NAME(fill_rows_of)(const REAL *row, int64_t rows, REAL *to, const int64_t padded) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v < padded; v += NAME(LANES)) AT(to + r * padded + v) = AT(row + v);
}

static void NAME(fill_rows)(const REAL *row, int64_t rows, REAL *to, int64_t padded) {
    FOR_WIDTH(NAME(fill_rows_of), row, rows, to)
}

/* to += the sum of rows */
static void NAME(sum_rows)(const REAL *x, int64_t rows, REAL *to, int64_t padded) {
    for (int64_t v = 0; v < padded; v += NAME(LANES)) {
        NAME(Vector) sum = {0};
        for (int64_t r = 0; r < rows; r++) sum += AT(x + r * padded + v);
        AT(to + v) += sum;
    }
}

/* unit = (x - mean) / deviation of each row; inverse[r] = 1 / deviation. Rows are padded with zeros,
 * `valid` is 1 where they are not. */
INLINE void NAME(normalise_of)(const REAL *x, const REAL *valid, int64_t rows, int64_t size,
                               REAL *unit, REAL *restrict inverse, const int64_t padded) {
    const REAL share = (REAL)1 / size;
    for (int64_t r = 0; r < rows; r++) {
        NAME(Vector) sum = {0}, square = {0};
        for (int64_t v = 0; v < padded; v += NAME(LANES)) sum += AT(x + r * padded + v);
        const REAL mean = NAME(total)(sum) * share;
        for (int64_t v = 0; v < padded; v += NAME(LANES)) {
            const NAME(Vector) away = (AT(x + r * padded + v) - mean) * AT(valid + v);
            square += away * away;
            AT(unit + r * padded + v) = away;
        }
        inverse[r] = NAME(total)(square) * share + (REAL)1e-5;
    }
    for (int64_t r = 0; r < rows; r++) inverse[r] = 1 / NAME(root)(inverse[r]);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v < padded; v += NAME(LANES)) AT(unit + r * padded + v) *= inverse[r];
}

static void NAME(normalise)(const REAL *x, const REAL *valid, int64_t rows, int64_t size,
                            REAL *unit, REAL *inverse, int64_t padded) {
    FOR_WIDTH(NAME(normalise_of), x, valid, rows, size, unit, inverse)
}

/* grad: that of weight * unit + bias becomes that of x; adds to those of weight and bias. */
INLINE void NAME(normalise_backward_of)(REAL *grad, const REAL *unit, const REAL *inverse,
                                        const REAL *valid, const REAL *weight, int64_t rows,
                                        int64_t size, REAL *grad_weight, REAL *grad_bias,
                                        const int64_t padded) {
    const REAL share = (REAL)1 / size;
    for (int64_t r = 0; r < rows; r++) {
        const REAL *x = unit + r * padded;
        REAL *g = grad + r * padded;
        NAME(Vector) sum = {0}, along = {0};
        for (int64_t v = 0; v < padded; v += NAME(LANES)) {
            const NAME(Vector) given = AT(g + v), scaled = given * AT(weight + v);
            AT(grad_weight + v) += given * AT(x + v);
            AT(grad_bias + v) += given;
            sum += scaled;
            along += scaled * AT(x + v);
            AT(g + v) = scaled;
        }
        const REAL mean = NAME(total)(sum) * share, slope = NAME(total)(along) * share;
        for (int64_t v = 0; v < padded; v += NAME(LANES))
            AT(g + v) = (AT(g + v) - mean * AT(valid + v) - AT(x + v) * slope) * inverse[r];
    }
}

static void NAME(normalise_backward)(REAL *grad, const REAL *unit, const REAL *inverse,
                                     const REAL *valid, const REAL *weight, int64_t rows,
                                     int64_t size, REAL *grad_weight, REAL *grad_bias,
                                     int64_t padded) {
    FOR_WIDTH(NAME(normalise_backward_of), grad, unit, inverse, valid, weight, rows, size,
              grad_weight, grad_bias)
}

/* What one thread works in. */
typedef struct {
    const Sizes *sizes;
    int64_t block, padded, padded_hidden; /* rows of a block, D and H in whole vectors */
    const uint64_t *seeds;
    void *memory;
    Layout layout;
    REAL *weights[PARTS], *gradients[PARTS];
    REAL *valid;
    REAL *y, *columns, *grad_y;                      /* [T, B, D]; columns become their gradients */
    REAL *hidden, *grad_hidden, *hidden_turned;      /* [H, B D], [B D, H] of the MLP over columns */
    REAL *units, *grad_units;                        /* [B, H] of the MLP over features */
    REAL *features, *gelu, *slope, *joined, *unit, *inverse, *given, *grad, *keep; /* [B, D] of one column */
    uint64_t *words;
} NAME(Work);

static REAL *NAME(take)(REAL **memory, int64_t count) {
    REAL *taken = memset(*memory, 0, (size_t)count * sizeof(REAL));
    *memory += count;
    return taken;
}

static void NAME(take_weights)(REAL **memory, const Layout *layout, REAL **parts) {
    for (int i = 0; i < PARTS; i++)
        parts[i] = NAME(take)(memory, layout->rows[i] * layout->padded[i]);
}

static NAME(Work) NAME(work_new)(const Sizes *s, const int64_t *seeds) {
    NAME(Work) w = {.sizes = s, .seeds = (const uint64_t *)seeds};
    const int64_t d = w.padded = round_up(s->size, NAME(LANES));
    const int64_t h = w.padded_hidden = round_up(s->hidden, NAME(LANES));
    const int64_t fitting = BLOCK_BYTES / (int64_t)sizeof(REAL) / most(s->tokens * d, 1);
    w.block = least(most(least(fitting, BLOCK_WIDTH / most(d, 1)), 4), most(s->rows, 1));
    const int64_t all = s->tokens * w.block * d, wide = w.block * most(d, h);
    const int64_t words = most(wide, s->hidden) / 8 + 2;
    w.layout = layout_of(s, d, h);
    const int64_t count = 2 * w.layout.count + d + 3 * all + 3 * h * w.block * d + 2 * w.block * h +
                          7 * w.block * d + w.block + wide;
    w.memory = malloc((size_t)count * sizeof(REAL) + (size_t)words * 8);
    if (w.memory == NULL) return w;
    w.words = w.memory;
    REAL *next = (REAL *)(w.words + words);
    NAME(take_weights)(&next, &w.layout, w.weights);
    NAME(take_weights)(&next, &w.layout, w.gradients);
    w.valid = NAME(take)(&next, d);
    for (int64_t i = 0; i < s->size; i++) w.valid[i] = 1;
    w.y = NAME(take)(&next, all);
    w.columns = NAME(take)(&next, all);
    w.grad_y = NAME(take)(&next, all);
    w.hidden = NAME(take)(&next, h * w.block * d);
    w.grad_hidden = NAME(take)(&next, h * w.block * d);
    w.hidden_turned = NAME(take)(&next, h * w.block * d);
    w.units = NAME(take)(&next, w.block * h);
    w.grad_units = NAME(take)(&next, w.block * h);
    w.features = NAME(take)(&next, w.block * d);
    w.gelu = NAME(take)(&next, w.block * d);
    w.slope = NAME(take)(&next, w.block * d);
    w.joined = NAME(take)(&next, w.block * d);
    w.unit = NAME(take)(&next, w.block * d);
    w.given = NAME(take)(&next, w.block * d);
    w.grad = NAME(take)(&next, w.block * d);
    w.inverse = NAME(take)(&next, w.block);
    w.keep = NAME(take)(&next, wide);
    for (int64_t i = 0; i < wide; i++) w.keep[i] = 1;
    return w;
}

static void NAME(read_weights)(NAME(Work) *w, const REAL *given) {
    const Layout *l = &w->layout;
    for (int i = 0; i < GIVEN; i++) {
        NAME(pad)(given, l->rows[i], l->size[i], l->padded[i], w->weights[i]);
        given += l->rows[i] * l->size[i];
    }
    NAME(transpose)(w->weights[FEATURES_IN], l->padded[FEATURES_IN], w->sizes->size,
                    w->sizes->hidden, w->weights[FEATURES_IN_TURNED], w->padded);
    NAME(transpose)(w->weights[FEATURES_OUT], w->padded, w->sizes->hidden, w->sizes->size,
                    w->weights[FEATURES_OUT_TURNED], w->padded_hidden);
}

/* Write the gradients of the weights in the order of the weights, and set them to zero. */
static void NAME(write_gradients)(NAME(Work) *w, REAL *out) {
    const Layout *l = &w->layout;
    for (int i = 0; i < GIVEN; i++) {
        const int from = i == COLUMNS_IN ? COLUMNS_IN_TURNED : i;
        if (i == COLUMNS_IN)
            NAME(transpose)(w->gradients[from], l->padded[from], l->rows[from], l->size[from], out,
                            l->size[i]);
        else
            NAME(unpad)(w->gradients[i], l->rows[i], l->size[i], l->padded[i], out);
        memset(w->gradients[from], 0, (size_t)(l->rows[from] * l->padded[from]) * sizeof(REAL));
        out += l->rows[i] * l->size[i];
    }
}

/* keep = the factors of dropout for `rows` rows of `size` numbers from number `start` on; it is ones
 * where nothing is dropped. */
static void NAME(draw)(NAME(Work) *w, int seed, int64_t start, int64_t rows, int64_t size,
                       int64_t padded) {
    const int64_t first = start / 8, count = (start + rows * size + 7) / 8 - first;
    const REAL scale = (REAL)256 / (256 - w->sizes->threshold);
    const int32_t threshold = (int32_t)w->sizes->threshold;
    const uint8_t *drawn = (const uint8_t *)w->words + start % 8;
    REAL *restrict keep = w->keep;
    if (threshold == 0) return;
    for (int64_t i = 0; i < count; i++) w->words[i] = random_word(w->seeds[seed], first + i);
    if (size == padded)
        for (int64_t i = 0; i < rows * size; i++) keep[i] = drawn[i] >= threshold ? scale : 0;
    else
        for (int64_t r = 0; r < rows; r++)
            for (int64_t d = 0; d < size; d++)
                keep[r * padded + d] = drawn[r * size + d] >= threshold ? scale : 0;
}

/* grad = the gradient before relu and dropout, whose result is `hidden` */
static inline void NAME(relu_backward)(REAL *restrict grad, const REAL *restrict hidden, int64_t n,
                                       REAL scale) {
    for (int64_t i = 0; i < n; i++) grad[i] = hidden[i] <= 0 ? 0 : grad[i] * scale;
}

/* y = the normalised tokens of rows r .. r + b of a network, columns = the MLP over columns of y */
static void NAME(mix_columns)(NAME(Work) *w, const REAL *x, int64_t network, int64_t r, int64_t b) {
    const Sizes *s = w->sizes;
    const int64_t d = w->padded, width = b * d;
    const REAL *restrict keep = w->keep;
    for (int64_t t = 0; t < s->tokens; t++) {
        REAL *restrict y = w->y + t * width;
        const REAL *from = x + ((network * s->tokens + t) * s->rows + r) * s->size;
        from = NAME(padded)(from, b, s->size, d, y);
        NAME(normalise)(from, w->valid, b, s->size, y, w->inverse, d);
        NAME(scale_rows)(y, w->weights[NORM_WEIGHT], w->weights[NORM_BIAS], b, y, d, d);
    }
    NAME(product)(w->hidden, width, w->weights[COLUMNS_IN], s->tokens, 1, w->y, width, s->hidden,
                  width, s->tokens, 0);
    for (int64_t h = 0; h < s->hidden; h++) {
        REAL *restrict hidden = w->hidden + h * width;
        const REAL bias = w->weights[COLUMNS_IN_BIAS][h];
        NAME(draw)(w, 0, ((network * s->hidden + h) * s->rows + r) * s->size, b, s->size, d);
        for (int64_t i = 0; i < width; i++) {
            const REAL unit = hidden[i] + bias;
            hidden[i] = (unit <= 0 ? 0 : unit) * keep[i];
        }
    }
    NAME(product)(w->columns, width, w->weights[COLUMNS_OUT], w->padded_hidden, 1, w->hidden, width,
                  s->tokens, width, s->hidden, 0);
    for (int64_t t = 0; t < s->tokens; t++) {
        REAL *restrict columns = w->columns + t * width;
        const REAL bias = w->weights[COLUMNS_OUT_BIAS][t];
        for (int64_t i = 0; i < width; i++) columns[i] += bias;
    }
}

/* features = the MLP over features of y, units its hidden layer, of column t */
static void NAME(mix_features)(NAME(Work) *w, int64_t network, int64_t t, int64_t r, int64_t b) {
    const Sizes *s = w->sizes;
    const int64_t d = w->padded, h = w->padded_hidden;
    REAL *restrict units = w->units, *restrict features = w->features;
    const REAL *restrict keep = w->keep;
    NAME(fill_rows)(w->weights[FEATURES_IN_BIAS], b, units, h);
    NAME(product)(units, h, w->y + t * b * d, d, 1, w->weights[FEATURES_IN], h, b, h, s->size, 1);
    NAME(draw)(w, 1, ((network * s->tokens + t) * s->rows + r) * s->hidden, b, s->hidden, h);
    for (int64_t i = 0; i < b * h; i++) units[i] = (units[i] <= 0 ? 0 : units[i]) * keep[i];
    NAME(fill_rows)(w->weights[FEATURES_OUT_BIAS], b, features, d);
    NAME(product)(features, d, units, h, 1, w->weights[FEATURES_OUT], d, b, d, s->hidden, 1);
}

/* unit, inverse: the normalised product of features and GELU(columns) of column t; joined: before
 * SiLU; keep: the factors of the last dropout */
static void NAME(join)(NAME(Work) *w, int64_t network, int64_t t, int64_t r, int64_t b) {
    const Sizes *s = w->sizes;
    const int64_t d = w->padded, n = b * d;
    const REAL *restrict columns = w->columns + t * n, *restrict features = w->features;
    REAL *restrict gelu = w->gelu, *restrict slope = w->slope, *restrict unit = w->unit;
    for (int64_t i = 0; i < n; i++) {
        const REAL c = columns[i], e = NAME(exp)(c * c * (REAL)-0.5), p = NAME(normal)(c, e);
        gelu[i] = c * p;
        slope[i] = p + c * (REAL)0.39894228040143267794 * e;
        unit[i] = gelu[i] * features[i];
    }
    NAME(normalise)(unit, w->valid, b, s->size, unit, w->inverse, d);
    NAME(scale_rows)(unit, w->weights[OUT_WEIGHT], w->weights[OUT_BIAS], b, w->joined, d, d);
    NAME(draw)(w, 2, ((network * s->tokens + t) * s->rows + r) * s->size, b, s->size, d);
}

static inline REAL NAME(sigmoid)(REAL x) {
    const REAL e = NAME(exp)(x < 0 ? x : -x);
    return (x < 0 ? e : 1) / (1 + e);
}

/* out = the result of a column */
static void NAME(activate)(const NAME(Work) *w, int64_t n, REAL *restrict out) {
    const REAL *restrict joined = w->joined, *restrict keep = w->keep;
    for (int64_t i = 0; i < n; i++) out[i] = joined[i] * NAME(sigmoid)(joined[i]) * keep[i];
}

/* From the gradient of column t's result to those of features and columns, which become `grad` and
 * replace `columns` */
static void NAME(join_backward)(NAME(Work) *w, const REAL *restrict given, int64_t t, int64_t b) {
    const Sizes *s = w->sizes;
    const int64_t d = w->padded, n = b * d;
    REAL *restrict grad = w->grad, *restrict columns = w->columns + t * n;
    const REAL *restrict joined = w->joined, *restrict features = w->features;
    const REAL *restrict gelu = w->gelu, *restrict slope = w->slope, *restrict keep = w->keep;
    for (int64_t i = 0; i < n; i++) {
        const REAL p = NAME(sigmoid)(joined[i]);
        grad[i] = given[i] * keep[i] * p * (1 + joined[i] * (1 - p));
    }
    NAME(normalise_backward)(grad, w->unit, w->inverse, w->valid, w->weights[OUT_WEIGHT], b, s->size,
                             w->gradients[OUT_WEIGHT], w->gradients[OUT_BIAS], d);
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        columns[i] = grad[i] * features[i] * slope[i];
        sum += columns[i];
        grad[i] *= gelu[i];
    }
    w->gradients[COLUMNS_OUT_BIAS][t] += sum;
    NAME(sum_rows)(grad, b, w->gradients[FEATURES_OUT_BIAS], d);
}

/* grad_y of column t = what comes through the MLP over features */
static void NAME(features_backward)(NAME(Work) *w, int64_t t, int64_t b) {
    const Sizes *s = w->sizes;
    const int64_t d = w->padded, h = w->padded_hidden;
    const REAL scale = (REAL)256 / (256 - s->threshold);
    if (s->with_weights)
        NAME(product)(w->gradients[FEATURES_OUT], d, w->units, 1, h, w->grad, d, s->hidden, d, b, 1);
    NAME(product)(w->grad_units, h, w->grad, d, 1, w->weights[FEATURES_OUT_TURNED], h, b, h, s->size,
                  0);
    NAME(relu_backward)(w->grad_units, w->units, b * h, scale);
    NAME(sum_rows)(w->grad_units, b, w->gradients[FEATURES_IN_BIAS], h);
    if (s->with_weights)
        NAME(product)(w->gradients[FEATURES_IN], h, w->y + t * b * d, 1, d, w->grad_units, h, s->size, h,
                  b, 1);
    NAME(product)(w->grad_y + t * b * d, d, w->grad_units, h, 1, w->weights[FEATURES_IN_TURNED], d,
                  b, d, s->hidden, 0);
}

/* grad_y += what comes through the MLP over columns */
static void NAME(columns_backward)(NAME(Work) *w, int64_t b) {
    const Sizes *s = w->sizes;
    const int64_t width = b * w->padded, h = w->padded_hidden;
    const REAL scale = (REAL)256 / (256 - s->threshold);
    if (s->with_weights) {
        NAME(transpose)(w->hidden, width, s->hidden, width, w->hidden_turned, h);
        NAME(product)(w->gradients[COLUMNS_OUT], h, w->columns, width, 1, w->hidden_turned, h,
                      s->tokens, h, width, 1);
    }
    NAME(product)(w->grad_hidden, width, w->weights[COLUMNS_OUT], 1, h, w->columns, width,
                  s->hidden, width, s->tokens, 0);
    NAME(relu_backward)(w->grad_hidden, w->hidden, s->hidden * width, scale);
    for (int64_t i = 0; i < s->hidden; i++) {
        REAL sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; j++) sum += w->grad_hidden[i * width + j];
        w->gradients[COLUMNS_IN_BIAS][i] += sum;
    }
    if (s->with_weights) {
        NAME(transpose)(w->grad_hidden, width, s->hidden, width, w->hidden_turned, h);
        NAME(product)(w->gradients[COLUMNS_IN_TURNED], h, w->y, width, 1, w->hidden_turned, h,
                      s->tokens, h, width, 1);
    }
    NAME(product)(w->grad_y, width, w->weights[COLUMNS_IN], 1, s->tokens, w->grad_hidden, width,
                  s->tokens, width, s->hidden, 1);
}

int NAME(tab_mixer)(const REAL *x, const REAL *weights, const int64_t *seeds, REAL *out,
                    int64_t networks, int64_t tokens, int64_t rows, int64_t size, int64_t hidden,
                    int64_t threshold, int threads) {
    const Sizes s = {networks, tokens, rows, size, hidden, threshold, 0};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        NAME(Work) w = NAME(work_new)(&s, seeds);
        failed |= w.memory == NULL;
        const int64_t blocks = (rows + w.block - 1) / w.block;
        int64_t last = -1;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < networks * blocks; i++) {
            if (failed) continue;
            const int64_t network = i / blocks, r = i % blocks * w.block;
            const int64_t b = least(w.block, rows - r), n = b * w.padded;
            if (network != last)
                NAME(read_weights)(&w, weights + network * w.layout.given);
            last = network;
            NAME(mix_columns)(&w, x, network, r, b);
            for (int64_t t = 0; t < tokens; t++) {
                NAME(mix_features)(&w, network, t, r, b);
                NAME(join)(&w, network, t, r, b);
                REAL *to = out + ((network * tokens + t) * rows + r) * size;
                NAME(activate)(&w, n, size == w.padded ? to : w.unit);
                if (size < w.padded) NAME(unpad)(w.unit, b, size, w.padded, to);
            }
        }
        free(w.memory);
    }
    return failed;
}

int NAME(tab_mixer_backward)(const REAL *grad, const REAL *x, const REAL *weights,
                             const int64_t *seeds, REAL *grad_weights, REAL *grad_x,
                             int64_t networks, int64_t tokens, int64_t rows, int64_t size,
                             int64_t hidden, int64_t threshold, int64_t with_weights, int64_t parts,
                             int threads) {
    const Sizes s = {networks, tokens, rows, size, hidden, threshold, with_weights};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        NAME(Work) w = NAME(work_new)(&s, seeds);
        failed |= w.memory == NULL;
        const int64_t d = w.padded, blocks = (rows + w.block - 1) / w.block;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < networks * parts; i++) {
            if (failed) continue;
            const int64_t network = i / parts, part = i % parts;
            NAME(read_weights)(&w, weights + network * w.layout.given);
            for (int64_t k = blocks * part / parts; k < blocks * (part + 1) / parts; k++) {
                const int64_t r = k * w.block, b = least(w.block, rows - r);
                NAME(mix_columns)(&w, x, network, r, b);
                for (int64_t t = 0; t < tokens; t++) {
                    const int64_t at = ((network * tokens + t) * rows + r) * size;
                    NAME(mix_features)(&w, network, t, r, b);
                    NAME(join)(&w, network, t, r, b);
                    NAME(join_backward)(&w, NAME(padded)(grad + at, b, size, d, w.given), t, b);
                    NAME(features_backward)(&w, t, b);
                }
                NAME(columns_backward)(&w, b);
                for (int64_t t = 0; t < tokens; t++) {
                    const int64_t at = ((network * tokens + t) * rows + r) * size;
                    REAL *grad_y = w.grad_y + t * b * d;
                    const REAL *from = NAME(padded)(x + at, b, size, d, w.unit);
                    NAME(normalise)(from, w.valid, b, size, w.unit, w.inverse, d);
                    NAME(normalise_backward)(grad_y, w.unit, w.inverse, w.valid,
                                             w.weights[NORM_WEIGHT], b, size,
                                             w.gradients[NORM_WEIGHT], w.gradients[NORM_BIAS], d);
                    NAME(unpad)(grad_y, b, size, d, grad_x + at);
                }
            }
            NAME(write_gradients)(&w, grad_weights + i * w.layout.given);
        }
        free(w.memory);
    }
    return failed;
}

/* Tokens [T, R, D] of a network, or [R, T, D]: numbers to token t of row r. */
static inline int64_t NAME(place)(const Sizes *s, int64_t network, int64_t t, int64_t r,
                                  int64_t by_row) {
    const int64_t inside = by_row ? r * s->tokens + t : t * s->rows + r;
    return (network * s->tokens * s->rows + inside) * s->size;
}

/* A layer norm of its own takes rows of the working space: unit, then one row each of the rest. */
enum { NAME(NORM_ROWS) = 32 };

typedef struct {
    int64_t padded;
    REAL *memory, *unit, *grad, *inverse, *valid, *weight, *bias, *grad_weight, *grad_bias;
} NAME(Norm);

static NAME(Norm) NAME(norm_new)(int64_t size) {
    NAME(Norm) n = {.padded = round_up(size, NAME(LANES))};
    REAL *next = n.memory =
        malloc((size_t)((2 * NAME(NORM_ROWS) + 5) * n.padded + NAME(NORM_ROWS)) * sizeof(REAL));
    if (n.memory == NULL) return n;
    n.unit = NAME(take)(&next, NAME(NORM_ROWS) * n.padded);
    n.grad = NAME(take)(&next, NAME(NORM_ROWS) * n.padded);
    n.inverse = NAME(take)(&next, NAME(NORM_ROWS));
    n.valid = NAME(take)(&next, n.padded);
    n.weight = NAME(take)(&next, n.padded);
    n.bias = NAME(take)(&next, n.padded);
    n.grad_weight = NAME(take)(&next, n.padded);
    n.grad_bias = NAME(take)(&next, n.padded);
    for (int64_t i = 0; i < size; i++) n.valid[i] = 1;
    return n;
}

int NAME(layer_norm)(const REAL *x, const REAL *weight, const REAL *bias, REAL *out,
                     int64_t networks, int64_t tokens, int64_t rows, int64_t size, int64_t by_row,
                     int threads) {
    const Sizes s = {networks, tokens, rows, size, 0, 0, 0};
    const int64_t blocks = (rows + NAME(NORM_ROWS) - 1) / NAME(NORM_ROWS);
    const int64_t stride = by_row ? tokens * size : size;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        NAME(Norm) n = NAME(norm_new)(size);
        failed |= n.memory == NULL;
        const int64_t d = n.padded;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < networks * blocks; i++) {
            if (failed) continue;
            const int64_t network = i / blocks, r = i % blocks * NAME(NORM_ROWS);
            const int64_t b = least(NAME(NORM_ROWS), rows - r);
            NAME(pad)(weight + network * size, 1, size, d, n.weight);
            NAME(pad)(bias + network * size, 1, size, d, n.bias);
            for (int64_t t = 0; t < tokens; t++) {
                const REAL *from = x + NAME(place)(&s, network, t, r, 0);
                from = NAME(padded)(from, b, size, d, n.unit);
                NAME(normalise)(from, n.valid, b, size, n.unit, n.inverse, d);
                REAL *to = out + NAME(place)(&s, network, t, r, by_row);
                if (size == d) {
                    NAME(scale_rows)(n.unit, n.weight, n.bias, b, to, stride, d);
                    continue;
                }
                NAME(scale_rows)(n.unit, n.weight, n.bias, b, n.unit, d, d);
                NAME(copy_rows)(n.unit, b, d, to, stride, size);
            }
        }
        free(n.memory);
    }
    return failed;
}

/* grad_weights [networks, parts, 2, D]: those of weight and bias. */
int NAME(layer_norm_backward)(const REAL *grad, const REAL *x, const REAL *weight,
                              REAL *grad_weights, REAL *grad_x, int64_t networks, int64_t tokens,
                              int64_t rows, int64_t size, int64_t by_row, int64_t parts,
                              int threads) {
    const Sizes s = {networks, tokens, rows, size, 0, 0, 0};
    const int64_t blocks = (rows + NAME(NORM_ROWS) - 1) / NAME(NORM_ROWS);
    const int64_t stride = by_row ? tokens * size : size;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        NAME(Norm) n = NAME(norm_new)(size);
        failed |= n.memory == NULL;
        const int64_t d = n.padded;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < networks * parts; i++) {
            if (failed) continue;
            const int64_t network = i / parts, part = i % parts;
            NAME(pad)(weight + network * size, 1, size, d, n.weight);
            memset(n.grad_weight, 0, (size_t)d * sizeof(REAL));
            memset(n.grad_bias, 0, (size_t)d * sizeof(REAL));
            for (int64_t k = blocks * part / parts; k < blocks * (part + 1) / parts; k++) {
                const int64_t r = k * NAME(NORM_ROWS), b = least(NAME(NORM_ROWS), rows - r);
                for (int64_t t = 0; t < tokens; t++) {
                    const int64_t at = NAME(place)(&s, network, t, r, 0);
                    const REAL *from = NAME(padded)(x + at, b, size, d, n.unit);
                    NAME(normalise)(from, n.valid, b, size, n.unit, n.inverse, d);
                    NAME(copy_rows)(grad + NAME(place)(&s, network, t, r, by_row), b, stride,
                                    n.grad, d, size);
                    NAME(normalise_backward)(n.grad, n.unit, n.inverse, n.valid, n.weight, b, size,
                                             n.grad_weight, n.grad_bias, d);
                    NAME(unpad)(n.grad, b, size, d, grad_x + at);
                }
            }
            NAME(unpad)(n.grad_weight, 1, size, d, grad_weights + 2 * i * size);
            NAME(unpad)(n.grad_bias, 1, size, d, grad_weights + (2 * i + 1) * size);
        }
        free(n.memory);
    }
    return failed;
}

/* LINEAR_ROWS results of one panel of columns, two vectors wide, or less in the last panel. Sums go
 * over the inputs in their order, and there are always as many rows, so that a row's result knows
 * nothing of the others. */
static inline __attribute__((always_inline)) void NAME(linear_panel)(
    const REAL *const x[LINEAR_ROWS], const REAL *weight, int64_t outputs, int64_t inputs,
    REAL sums[LINEAR_ROWS][LINEAR_BYTES / sizeof(REAL)]) {
    enum { VECTORS = LINEAR_BYTES / BYTES };
    NAME(Vector) y[LINEAR_ROWS][VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < LINEAR_ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) y[i][v] = AT(sums[i] + v * NAME(LANES));
    for (int64_t k = 0; k < inputs; k++) {
        const NAME(Vector) *right = (const NAME(Vector) *)(weight + k * outputs);
#pragma GCC unroll 4
        for (int i = 0; i < LINEAR_ROWS; i++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) y[i][v] += x[i][k] * right[v];
    }
#pragma GCC unroll 4
    for (int i = 0; i < LINEAR_ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) AT(sums[i] + v * NAME(LANES)) = y[i][v];
}

static void NAME(linear_narrow)(const REAL *const x[LINEAR_ROWS], const REAL *weight,
                                int64_t outputs, int64_t inputs, int64_t width,
                                REAL sums[LINEAR_ROWS][LINEAR_BYTES / sizeof(REAL)]) {
    for (int64_t k = 0; k < inputs; k++)
        for (int i = 0; i < LINEAR_ROWS; i++)
            for (int64_t j = 0; j < width; j++)
                sums[i][j] = NAME(multiply_add)(x[i][k], weight[k * outputs + j], sums[i][j]);
}

/* out = x weight + bias for x [networks, rows, inputs] and weight [networks, inputs, outputs]. */
int NAME(linear)(const REAL *x, const REAL *weight, const REAL *bias, REAL *out, int64_t networks,
                 int64_t rows, int64_t inputs, int64_t outputs, int threads) {
    enum { WIDTH = LINEAR_BYTES / sizeof(REAL) };
    const int64_t panels = (outputs + WIDTH - 1) / WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < networks * panels; p++) {
        const int64_t network = p / panels, begin = p % panels * WIDTH;
        const int64_t width = least(WIDTH, outputs - begin);
        const REAL *w = weight + network * inputs * outputs + begin;
        const REAL *terms = bias + network * outputs + begin;
        for (int64_t r = 0; r < rows; r += LINEAR_ROWS) {
            const REAL *from[LINEAR_ROWS];
            REAL sums[LINEAR_ROWS][WIDTH];
            for (int i = 0; i < LINEAR_ROWS; i++) {
                from[i] = x + (network * rows + least(r + i, rows - 1)) * inputs;
                memcpy(sums[i], terms, (size_t)width * sizeof(REAL));
            }
            if (width == WIDTH)
                NAME(linear_panel)(from, w, outputs, inputs, sums);
            else
                NAME(linear_narrow)(from, w, outputs, inputs, width, sums);
            for (int64_t i = 0; i < least(LINEAR_ROWS, rows - r); i++)
                memcpy(out + (network * rows + r + i) * outputs + begin, sums[i],
                       (size_t)width * sizeof(REAL));
        }
    }
    return 0;
}

#endif
