/* Hash-sampled attention on CPUs: one thread walks one user's history for all of the user's
 * queries, so results do not depend on the number of threads.
 *
 * Running sums are doubles. Taking a float back out of a sum of doubles leaves practically no
 * trace, so the backward walk recovers the table of every cut instead of storing it, and a window
 * slides without drift.
 *
 * The second half is included twice, for float and for double.
 */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Bucket sums [groups, buckets, size]. A row's content is undefined while its count is zero, so
 * that emptying the table costs nothing. */
typedef struct {
    int64_t groups, buckets, size;
    double *rows;
    int32_t *counts;
} Table;

static Table table_new(int64_t groups, int64_t buckets, int64_t size) {
    const size_t n = (size_t)groups * (size_t)buckets;
    Table table = {groups, buckets, size, NULL, NULL};
    table.rows = malloc(n * (size_t)size * sizeof(double) + 1);
    table.counts = calloc(n + 1, sizeof(int32_t));
    return table;
}

static void table_free(Table table) {
    free(table.rows);
    free(table.counts);
}

static inline int64_t bucket_of(const Table *table, const int32_t *codes, int64_t group) {
    return group * table->buckets + codes[group];
}

static inline void row_add(Table *table, int64_t bucket, const double *restrict x) {
    double *restrict row = table->rows + bucket * table->size;
    if (table->counts[bucket]++ == 0)
        memcpy(row, x, (size_t)table->size * sizeof(double));
    else
        for (int64_t d = 0; d < table->size; d++) row[d] += x[d];
}

static inline void row_remove(Table *table, int64_t bucket, const double *restrict x) {
    double *restrict row = table->rows + bucket * table->size;
    if (--table->counts[bucket] > 0)
        for (int64_t d = 0; d < table->size; d++) row[d] -= x[d];
}

static void table_add(Table *table, const int32_t *codes, const double *x) {
    for (int64_t g = 0; g < table->groups; g++) row_add(table, bucket_of(table, codes, g), x);
}

static void table_remove(Table *table, const int32_t *codes, const double *x) {
    for (int64_t g = 0; g < table->groups; g++) row_remove(table, bucket_of(table, codes, g), x);
}

static void table_forget(Table *table, const int32_t *codes, int64_t n) {
    for (int64_t j = 0; j < n; j++)
        for (int64_t g = 0; g < table->groups; g++)
            table->counts[bucket_of(table, codes + j * table->groups, g)] = 0;
}

/* sum[d] = the sum over the groups of the rows that `codes` fall into. */
static void table_gather(const Table *table, const int32_t *codes, double *restrict sum) {
    const int64_t size = table->size;
    memset(sum, 0, (size_t)size * sizeof(double));
    for (int64_t g = 0; g < table->groups; g++) {
        const int64_t bucket = bucket_of(table, codes, g);
        const double *restrict row = table->rows + bucket * size;
        if (table->counts[bucket] > 0)
            for (int64_t d = 0; d < size; d++) sum[d] += row[d];
    }
}

/* sum += row / |row| */
static inline void normalised_add(const double *restrict row, int64_t size, double *restrict sum) {
    double square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < size; d++) square += row[d] * row[d];
    if (!(square > 0)) return;
    const double scale = 1 / sqrt(square);
    for (int64_t d = 0; d < size; d++) sum[d] += scale * row[d];
}

/* The gradient of row / |row|: (upstream - u (u . upstream)) / |row|. False for a zero row. */
static inline int normalised_backward(const double *restrict row, const double *restrict upstream,
                                      int64_t size, double *restrict gradient) {
    double square = 0, product = 0;
#pragma omp simd reduction(+ : square, product)
    for (int64_t d = 0; d < size; d++) {
        square += row[d] * row[d];
        product += row[d] * upstream[d];
    }
    if (!(square > 0)) return 0;
    const double scale = 1 / sqrt(square), along = product / square;
    for (int64_t d = 0; d < size; d++) gradient[d] = scale * (upstream[d] - along * row[d]);
    return 1;
}

/* Signature bits are `x . plane > 0`, lowest bit first. Each product is one chain of float32
 * additions whatever the batch, so a row has the same codes alone as among others. */
enum { TILE_ROWS = 4, TILE_PLANES = 32 };

static void signature_tile(const float *restrict x, int64_t rows, int64_t size,
                           const float *restrict planes, int64_t stride, uint8_t *bits) {
    float sums[TILE_ROWS][TILE_PLANES] = {{0}};
    const float *row[TILE_ROWS];
    for (int64_t r = 0; r < TILE_ROWS; r++) row[r] = x + (r < rows ? r : rows - 1) * size;
    for (int64_t d = 0; d < size; d++)
        for (int64_t r = 0; r < TILE_ROWS; r++)
            for (int64_t m = 0; m < TILE_PLANES; m++)
                sums[r][m] += row[r][d] * planes[d * stride + m];
    for (int64_t r = 0; r < TILE_ROWS; r++)
        for (int64_t m = 0; m < TILE_PLANES; m++) bits[r * stride + m] = sums[r][m] > 0;
}

int sdim_codes(const float *x, const float *planes, int32_t *codes, int64_t rows, int64_t size,
               int64_t groups, int64_t tau, int threads) {
    const int64_t n_planes = groups * tau;
    const int64_t stride = (n_planes + TILE_PLANES - 1) / TILE_PLANES * TILE_PLANES;
    float *padded = calloc((size_t)(size * stride) + 1, sizeof(float));
    if (padded == NULL) return 1;
    for (int64_t d = 0; d < size; d++)
        memcpy(padded + d * stride, planes + d * n_planes, (size_t)n_planes * sizeof(float));
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        uint8_t *bits = malloc((size_t)(TILE_ROWS * stride));
        failed |= bits == NULL;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
            if (failed) continue;
            const int64_t left = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
            for (int64_t m = 0; m < stride; m += TILE_PLANES)
                signature_tile(x + i * size, left, size, padded + m, stride, bits + m);
            for (int64_t r = 0; r < left; r++)
                for (int64_t g = 0; g < groups; g++) {
                    int32_t code = 0;
                    for (int64_t t = 0; t < tau; t++)
                        code |= bits[r * stride + g * tau + t] << t;
                    codes[(i + r) * groups + g] = code;
                }
        }
        free(bits);
    }
    free(padded);
    return failed;
}

#define REAL float
#define NAME(function) function##_float
#include "native.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(function) function##_double
#include "native.c"

#else

static inline const double *NAME(widen)(const REAL *restrict x, int64_t size, double *restrict y) {
    for (int64_t d = 0; d < size; d++) y[d] = x[d];
    return y;
}

int NAME(sdim_encode)(const REAL *values, const int64_t *offsets, const int32_t *codes,
                      REAL *out, int64_t users, int64_t groups, int64_t buckets, int64_t size,
                      int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Table table = table_new(groups, buckets, size);
        double *x = malloc((size_t)size * sizeof(double) + 1);
        failed |= !table.rows || !table.counts || !x;
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < users; u++) {
            if (failed) continue;
            for (int64_t j = offsets[u]; j < offsets[u + 1]; j++)
                table_add(&table, codes + j * groups, NAME(widen)(values + j * size, size, x));
            REAL *restrict row = out + u * groups * buckets * size;
            for (int64_t b = 0; b < groups * buckets; b++, row += size) {
                const double *restrict sum = table.rows + b * size;
                for (int64_t d = 0; d < size; d++)
                    row[d] = table.counts[b] > 0 ? (REAL)sum[d] : 0;
                table.counts[b] = 0;
            }
        }
        free(x);
        table_free(table);
    }
    return failed;
}

int NAME(sdim_encode_backward)(const REAL *grad_table, const int64_t *offsets,
                               const int32_t *codes, REAL *grad_values, int64_t users,
                               int64_t groups, int64_t buckets, int64_t size, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t u = 0; u < users; u++) {
        const REAL *table = grad_table + u * groups * buckets * size;
        for (int64_t j = offsets[u]; j < offsets[u + 1]; j++) {
            REAL *restrict out = grad_values + j * size;
            memset(out, 0, (size_t)size * sizeof(REAL));
            for (int64_t g = 0; g < groups; g++) {
                const REAL *restrict row = table + (g * buckets + codes[j * groups + g]) * size;
                for (int64_t d = 0; d < size; d++) out[d] += row[d];
            }
        }
    }
    return 0;
}

int NAME(sdim_read)(const REAL *table, const int32_t *codes, REAL *out, int64_t users,
                    int64_t candidates, int64_t groups, int64_t buckets, int64_t size,
                    int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        double *buffer = malloc(2 * (size_t)size * sizeof(double) + 1);
        double *row = buffer, *sum = buffer + size;
        failed |= buffer == NULL;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < users * candidates; i++) {
            if (failed) continue;
            const REAL *rows = table + i / candidates * groups * buckets * size;
            memset(sum, 0, (size_t)size * sizeof(double));
            for (int64_t g = 0; g < groups; g++)
                normalised_add(
                    NAME(widen)(rows + (g * buckets + codes[i * groups + g]) * size, size, row),
                    size, sum);
            for (int64_t d = 0; d < size; d++) out[i * size + d] = (REAL)(sum[d] / groups);
        }
        free(buffer);
    }
    return failed;
}

int NAME(sdim_read_backward)(const REAL *grad, const REAL *table, const int32_t *codes,
                             REAL *grad_table, int64_t users, int64_t candidates, int64_t groups,
                             int64_t buckets, int64_t size, int threads) {
    const int64_t table_size = groups * buckets * size;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        double *buffer = malloc(3 * (size_t)size * sizeof(double) + 1);
        double *row = buffer, *upstream = buffer + size, *gradient = buffer + 2 * size;
        failed |= buffer == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < users; u++) {
            if (failed) continue;
            memset(grad_table + u * table_size, 0, (size_t)table_size * sizeof(REAL));
            for (int64_t i = u * candidates; i < (u + 1) * candidates; i++) {
                for (int64_t d = 0; d < size; d++) upstream[d] = grad[i * size + d] / (double)groups;
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t at =
                        u * table_size + (g * buckets + codes[i * groups + g]) * size;
                    REAL *restrict out = grad_table + at;
                    if (normalised_backward(NAME(widen)(table + at, size, row), upstream, size,
                                            gradient))
                        for (int64_t d = 0; d < size; d++) out[d] += (REAL)gradient[d];
                }
            }
        }
        free(buffer);
    }
    return failed;
}

/* Queries of user u are query_offsets[u] .. query_offsets[u + 1], their cuts ascending; each sees
 * the behaviours cut - last .. cut of its user. */
int NAME(sdim_attend_at)(const REAL *values, const int64_t *offsets, const int32_t *codes,
                         const int32_t *query_codes, const int64_t *query_offsets,
                         const int64_t *cuts, REAL *out, int64_t users, int64_t groups,
                         int64_t buckets, int64_t size, int64_t last, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Table table = table_new(groups, buckets, size);
        double *buffer = malloc(2 * (size_t)size * sizeof(double) + 1);
        double *x = buffer, *sum = buffer + size;
        failed |= !table.rows || !table.counts || !buffer;
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < users; u++) {
            if (failed) continue;
            const REAL *history = values + offsets[u] * size;
            const int32_t *history_codes = codes + offsets[u] * groups;
            int64_t begin = 0, end = 0;
            for (int64_t i = query_offsets[u]; i < query_offsets[u + 1]; i++) {
                for (; end < cuts[i]; end++)
                    table_add(&table, history_codes + end * groups,
                              NAME(widen)(history + end * size, size, x));
                for (; begin < cuts[i] - last; begin++)
                    table_remove(&table, history_codes + begin * groups,
                                 NAME(widen)(history + begin * size, size, x));
                memset(sum, 0, (size_t)size * sizeof(double));
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t bucket = bucket_of(&table, query_codes + i * groups, g);
                    if (table.counts[bucket] > 0)
                        normalised_add(table.rows + bucket * size, size, sum);
                }
                for (int64_t d = 0; d < size; d++) out[i * size + d] = (REAL)(sum[d] / groups);
            }
            table_forget(&table, history_codes, end);
        }
        free(buffer);
        table_free(table);
    }
    return failed;
}

/* The same walk from the last query to the first. `table` is taken back to each cut, `grads`
 * collects the gradients of the rows that queries read and is never reduced. Behaviour j is seen
 * by the queries processed between its entry into the window from below and its exit at the top:
 * its gradient is what its rows of `grads` gained in between. */
int NAME(sdim_attend_at_backward)(const REAL *grad, const REAL *values, const int64_t *offsets,
                                  const int32_t *codes, const int32_t *query_codes,
                                  const int64_t *query_offsets, const int64_t *cuts,
                                  REAL *grad_values, int64_t users, int64_t groups,
                                  int64_t buckets, int64_t size, int64_t last, int threads) {
    int64_t longest = 0;
    for (int64_t u = 0; u < users; u++)
        if (offsets[u + 1] - offsets[u] > longest) longest = offsets[u + 1] - offsets[u];
    const int windowed = last < longest;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Table table = table_new(groups, buckets, size), grads = table_new(groups, buckets, size);
        double *buffer = malloc(4 * (size_t)size * sizeof(double) + 1);
        double *x = buffer, *sum = buffer + size;
        double *upstream = buffer + 2 * size, *gradient = buffer + 3 * size;
        double *before = calloc((size_t)(windowed ? longest * size : size) + 1, sizeof(double));
        failed |= !table.rows || !table.counts || !grads.rows || !grads.counts || !buffer ||
                  !before;
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < users; u++) {
            if (failed) continue;
            const int64_t length = offsets[u + 1] - offsets[u];
            const int64_t first = query_offsets[u], n = query_offsets[u + 1] - first;
            const REAL *history = values + offsets[u] * size;
            const int32_t *history_codes = codes + offsets[u] * groups;
            REAL *out = grad_values + offsets[u] * size;
            int64_t end = n > 0 ? cuts[first + n - 1] : 0, begin = end;
            memset(out + end * size, 0, (size_t)((length - end) * size) * sizeof(REAL));
            for (int64_t i = first + n - 1; i >= first - 1; i--) {
                const int64_t cut = i >= first ? cuts[i] : 0;
                const int64_t from = cut > last ? cut - last : 0;
                while (begin > from) {
                    begin--;
                    if (windowed)
                        table_gather(&grads, history_codes + begin * groups, before + begin * size);
                    table_add(&table, history_codes + begin * groups,
                              NAME(widen)(history + begin * size, size, x));
                }
                while (end > cut) {
                    end--;
                    const double *restrict old = windowed ? before + end * size : before;
                    table_gather(&grads, history_codes + end * groups, sum);
                    for (int64_t d = 0; d < size; d++)
                        out[end * size + d] = (REAL)(sum[d] - old[d]);
                    table_remove(&table, history_codes + end * groups,
                                 NAME(widen)(history + end * size, size, x));
                }
                if (i < first) break;
                for (int64_t d = 0; d < size; d++) upstream[d] = grad[i * size + d] / (double)groups;
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t bucket = bucket_of(&table, query_codes + i * groups, g);
                    if (table.counts[bucket] > 0 &&
                        normalised_backward(table.rows + bucket * size, upstream, size, gradient))
                        row_add(&grads, bucket, gradient);
                }
            }
            table_forget(&grads, query_codes + first * groups, n);
        }
        free(before);
        free(buffer);
        table_free(table);
        table_free(grads);
    }
    return failed;
}

#endif
