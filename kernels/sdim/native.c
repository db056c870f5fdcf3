/* Hash-sampled attention on CPUs. One thread serves one user, and one group of buckets after the
 * other: a group's table stays in the first-level cache, the result does not depend on the number
 * of threads, and beside it a thread holds what is linear in the largest user only.
 *
 * Running sums of behaviours are doubles; gradients add up in their own type. Only a sliding window
 * takes rows out of the sums again, which leaves a trace of rounding; zero rows are therefore never
 * counted in, or a bucket that holds nothing else would keep that trace and be scaled up to length
 * one.
 *
 * The second half is included twice, for float and for double.
 */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Sums of one group's buckets [buckets, size]. A row's content is undefined while its count is
 * zero, so that emptying the table costs nothing. */
typedef struct {
    int64_t buckets, size;
    double *rows;
    int32_t *counts;
} Table;

static Table table_new(int64_t buckets, int64_t size) {
    Table table = {buckets, size, NULL, NULL};
    table.rows = malloc((size_t)(buckets * size) * sizeof(double) + 1);
    table.counts = calloc((size_t)buckets, sizeof(int32_t));
    return table;
}

static int table_missing(Table table) { return table.rows == NULL || table.counts == NULL; }

static void table_free(Table table) {
    free(table.rows);
    free(table.counts);
}

/* Empty the buckets of `n` codes that lie `stride` apart. */
static void table_clear(Table *table, const int32_t *codes, int64_t n, int64_t stride) {
    if (n >= table->buckets)
        memset(table->counts, 0, (size_t)table->buckets * sizeof(int32_t));
    else
        for (int64_t j = 0; j < n; j++) table->counts[codes[j * stride]] = 0;
}

static inline void table_add(Table *table, int32_t code, const double *restrict x) {
    double *restrict row = table->rows + code * table->size;
    if (table->counts[code]++ == 0)
        memcpy(row, x, (size_t)table->size * sizeof(double));
    else
        for (int64_t d = 0; d < table->size; d++) row[d] += x[d];
}

/* 1 / |row|, and 0 for a row of zeros: it counts as zeros and has no gradient. */
static inline double inverse_norm(const double *restrict row, int64_t size) {
    double square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < size; d++) square += row[d] * row[d];
    return square > 0 ? 1 / sqrt(square) : 0;
}

/* The largest of the `n` segments that ascending offsets bound. */
static int64_t largest_step(const int64_t *offsets, int64_t n) {
    int64_t largest = 0;
    for (int64_t i = 0; i < n; i++)
        if (offsets[i + 1] - offsets[i] > largest) largest = offsets[i + 1] - offsets[i];
    return largest;
}

/* Signature bits are `x . plane > 0`, lowest bit first. Each product is one chain of float32
 * additions whatever the batch, so a row has the same codes alone as among others. Where the
 * processor fuses them, so do we: matrix products of torch and onnxruntime then round alike, and a
 * vector that lies on a plane but for rounding gets the same bit from all. */
#ifdef FP_FAST_FMAF
#define MULTIPLY_ADD(x, y, sum) fmaf(x, y, sum)
#else
#define MULTIPLY_ADD(x, y, sum) ((sum) + (x) * (y))
#endif
enum { TILE_ROWS = 4, TILE_PLANES = 32 };

static void signature_tile(const float *restrict x, int64_t rows, int64_t size,
                           const float *restrict planes, int64_t stride, uint8_t *bits) {
    float sums[TILE_ROWS][TILE_PLANES] = {{0}};
    const float *row[TILE_ROWS];
    for (int64_t r = 0; r < TILE_ROWS; r++) row[r] = x + (r < rows ? r : rows - 1) * size;
    for (int64_t d = 0; d < size; d++)
        for (int64_t r = 0; r < TILE_ROWS; r++)
            for (int64_t m = 0; m < TILE_PLANES; m++)
                sums[r][m] = MULTIPLY_ADD(row[r][d], planes[d * stride + m], sums[r][m]);
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

static inline void NAME(add)(Table *table, int32_t code, const REAL *restrict x) {
    double *restrict row = table->rows + code * table->size;
    if (table->counts[code]++ == 0)
        for (int64_t d = 0; d < table->size; d++) row[d] = x[d];
    else
        for (int64_t d = 0; d < table->size; d++) row[d] += x[d];
}

static inline void NAME(take)(Table *table, int32_t code, const REAL *restrict x) {
    double *restrict row = table->rows + code * table->size;
    if (--table->counts[code] > 0)
        for (int64_t d = 0; d < table->size; d++) row[d] -= x[d];
}

/* out += share row / |row| */
static inline void NAME(add_unit)(const double *restrict row, int64_t size, double share,
                                  REAL *restrict out) {
    const double scale = share * inverse_norm(row, size);
    for (int64_t d = 0; d < size; d++) out[d] += (REAL)(scale * row[d]);
}

/* The gradient of share row / |row|: share (upstream - u (u . upstream)) / |row|, u the unit row. */
static inline void NAME(unit_gradient)(const double *restrict row, const REAL *restrict upstream,
                                       int64_t size, double share, double *restrict gradient) {
    const double inverse = inverse_norm(row, size), scale = share * inverse;
    double along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t d = 0; d < size; d++) along += row[d] * upstream[d];
    along *= inverse * inverse;
    for (int64_t d = 0; d < size; d++) gradient[d] = scale * (upstream[d] - along * row[d]);
}

int NAME(sdim_encode)(const REAL *values, const int64_t *offsets, const int32_t *codes,
                      REAL *out, int64_t users, int64_t groups, int64_t buckets, int64_t size,
                      int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Table table = table_new(buckets, size);
        failed |= table_missing(table);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < users * groups; i++) {
            if (failed) continue;
            const int64_t u = i / groups, g = i % groups;
            for (int64_t j = offsets[u]; j < offsets[u + 1]; j++)
                NAME(add)(&table, codes[j * groups + g], values + j * size);
            for (int64_t b = 0; b < buckets; b++) {
                REAL *restrict row = out + (i * buckets + b) * size;
                const double *restrict sum = table.rows + b * size;
                for (int64_t d = 0; d < size; d++)
                    row[d] = table.counts[b] > 0 ? (REAL)sum[d] : 0;
                table.counts[b] = 0;
            }
        }
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
        double *restrict row = malloc((size_t)size * sizeof(double) + 1);
        failed |= row == NULL;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < users * candidates; i++) {
            if (failed) continue;
            memset(out + i * size, 0, (size_t)size * sizeof(REAL));
            for (int64_t g = 0; g < groups; g++) {
                const int64_t bucket = (i / candidates * groups + g) * buckets + codes[i * groups + g];
                for (int64_t d = 0; d < size; d++) row[d] = table[bucket * size + d];
                NAME(add_unit)(row, size, 1.0 / groups, out + i * size);
            }
        }
        free(row);
    }
    return failed;
}

int NAME(sdim_read_backward)(const REAL *grad, const REAL *table, const int32_t *codes,
                             REAL *grad_table, int64_t users, int64_t candidates, int64_t groups,
                             int64_t buckets, int64_t size, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        double *restrict row = malloc(2 * (size_t)size * sizeof(double) + 1);
        double *restrict gradient = row + size;
        failed |= row == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < users * groups; i++) {
            if (failed) continue;
            const int64_t u = i / groups, g = i % groups;
            memset(grad_table + i * buckets * size, 0, (size_t)(buckets * size) * sizeof(REAL));
            for (int64_t c = u * candidates; c < (u + 1) * candidates; c++) {
                const int64_t at = (i * buckets + codes[c * groups + g]) * size;
                for (int64_t d = 0; d < size; d++) row[d] = table[at + d];
                NAME(unit_gradient)(row, grad + c * size, size, 1.0 / groups, gradient);
                for (int64_t d = 0; d < size; d++) grad_table[at + d] += (REAL)gradient[d];
            }
        }
        free(row);
    }
    return failed;
}

/* One user's history and queries in one group: codes lie `groups` apart. Query i sees the
 * behaviours cuts[i] - last .. cuts[i]; cuts ascend. */
typedef struct {
    const REAL *values;
    const uint8_t *zero;
    const int32_t *codes, *query_codes;
    const int64_t *cuts;
    int64_t queries, groups, size, last;
} NAME(Walk);

/* zero[j] = whether behaviour j is a row of zeros */
static void NAME(find_zeros)(const REAL *values, int64_t rows, int64_t size, uint8_t *zero) {
    for (int64_t j = 0; j < rows; j++) {
        zero[j] = 1;
        for (int64_t d = 0; d < size && zero[j]; d++) zero[j] = values[j * size + d] == 0;
    }
}

static NAME(Walk) NAME(walk_of)(const REAL *values, const uint8_t *zero, const int64_t *offsets,
                                const int32_t *codes, const int32_t *query_codes,
                                const int64_t *query_offsets, const int64_t *cuts, int64_t user,
                                int64_t group, int64_t groups, int64_t size, int64_t last) {
    const int64_t first = offsets[user], query = query_offsets[user];
    NAME(Walk) walk = {values + first * size,
                       zero,
                       codes + first * groups + group,
                       query_codes + query * groups + group,
                       cuts + query,
                       query_offsets[user + 1] - query,
                       groups,
                       size,
                       last};
    return walk;
}

/* Bring the table to the window of query i; `begin` and `end` are those of the query before. */
static inline void NAME(slide)(Table *table, const NAME(Walk) *walk, int64_t i, int64_t *begin,
                               int64_t *end) {
    const int64_t cut = walk->cuts[i], size = walk->size;
    for (; *end < cut; ++*end)
        if (!walk->zero[*end])
            NAME(add)(table, walk->codes[*end * walk->groups], walk->values + *end * size);
    for (; *begin < cut - walk->last; ++*begin)
        if (!walk->zero[*begin])
            NAME(take)(table, walk->codes[*begin * walk->groups], walk->values + *begin * size);
}

static void NAME(attend_forward)(const NAME(Walk) *walk, Table *table, REAL *out) {
    int64_t begin = 0, end = 0;
    for (int64_t i = 0; i < walk->queries; i++) {
        NAME(slide)(table, walk, i, &begin, &end);
        const int32_t code = walk->query_codes[i * walk->groups];
        if (table->counts[code] > 0)
            NAME(add_unit)(table->rows + code * walk->size, walk->size, 1.0 / walk->groups,
                           out + i * walk->size);
    }
    table_clear(table, walk->codes, end, walk->groups);
}

/* found[i] = whether query i reads anything; gradients[i] = the gradient of the row it reads */
static void NAME(row_gradients)(const NAME(Walk) *walk, Table *table, const REAL *grad,
                                uint8_t *found, double *gradients) {
    const int64_t size = walk->size;
    int64_t begin = 0, end = 0;
    for (int64_t i = 0; i < walk->queries; i++) {
        NAME(slide)(table, walk, i, &begin, &end);
        const int32_t code = walk->query_codes[i * walk->groups];
        found[i] = table->counts[code] > 0;
        if (found[i])
            NAME(unit_gradient)(table->rows + code * size, grad + i * size, size,
                                1.0 / walk->groups, gradients + i * size);
    }
    table_clear(table, walk->codes, end, walk->groups);
}

/* before[j] = what the row of behaviour j has gathered so far */
static inline void NAME(remember)(const Table *gathered, const NAME(Walk) *walk, int64_t j,
                                  double *before) {
    const int32_t code = walk->codes[j * walk->groups];
    const size_t bytes = (size_t)walk->size * sizeof(double);
    if (gathered->counts[code] > 0)
        memcpy(before + j * walk->size, gathered->rows + code * walk->size, bytes);
    else
        memset(before + j * walk->size, 0, bytes);
}

/* out[j] += what the row of behaviour j has gathered since it was remembered, if it was */
static inline void NAME(collect)(const Table *gathered, const NAME(Walk) *walk, int64_t j,
                                 const double *before, REAL *out) {
    const int32_t code = walk->codes[j * walk->groups];
    const double *restrict row = gathered->rows + code * walk->size;
    REAL *restrict gradient = out + j * walk->size;
    if (gathered->counts[code] == 0) return;
    if (before == NULL)
        for (int64_t d = 0; d < walk->size; d++) gradient[d] += (REAL)row[d];
    else
        for (int64_t d = 0; d < walk->size; d++)
            gradient[d] += (REAL)(row[d] - before[j * walk->size + d]);
}

/* From the last query to the first, `gathered` collects the gradients of the rows that queries read.
 * The queries that see a behaviour are those met between its entry into the window from below and
 * its exit at the top. `before` is NULL without a window. */
static void NAME(attend_backward)(const NAME(Walk) *walk, const uint8_t *found,
                                  const double *gradients, Table *gathered, double *before,
                                  REAL *out) {
    const int64_t latest = walk->queries > 0 ? walk->cuts[walk->queries - 1] : 0;
    int64_t begin = latest, end = latest;
    for (int64_t i = walk->queries - 1; i >= 0; i--) {
        if (before != NULL)
            while (begin > 0 && begin > walk->cuts[i] - walk->last)
                NAME(remember)(gathered, walk, --begin, before);
        while (end > walk->cuts[i]) NAME(collect)(gathered, walk, --end, before, out);
        if (found[i])
            table_add(gathered, walk->query_codes[i * walk->groups], gradients + i * walk->size);
    }
    if (before == NULL) begin = 0;
    while (end > begin) NAME(collect)(gathered, walk, --end, before, out);
    table_clear(gathered, walk->query_codes, walk->queries, walk->groups);
}

int NAME(sdim_attend_at)(const REAL *values, const int64_t *offsets, const int32_t *codes,
                         const int32_t *query_codes, const int64_t *query_offsets,
                         const int64_t *cuts, REAL *out, int64_t users, int64_t groups,
                         int64_t buckets, int64_t size, int64_t last, int threads) {
    const int64_t longest = largest_step(offsets, users);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Table table = table_new(buckets, size);
        uint8_t *zero = malloc((size_t)longest + 1);
        failed |= table_missing(table) || zero == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < users; u++) {
            if (failed) continue;
            const int64_t rows = query_offsets[u + 1] - query_offsets[u];
            REAL *own = out + query_offsets[u] * size;
            memset(own, 0, (size_t)(rows * size) * sizeof(REAL));
            NAME(find_zeros)(values + offsets[u] * size, offsets[u + 1] - offsets[u], size, zero);
            for (int64_t g = 0; g < groups; g++) {
                const NAME(Walk) walk = NAME(walk_of)(values, zero, offsets, codes, query_codes,
                                                      query_offsets, cuts, u, g, groups, size,
                                                      last);
                NAME(attend_forward)(&walk, &table, own);
            }
        }
        free(zero);
        table_free(table);
    }
    return failed;
}

int NAME(sdim_attend_at_backward)(const REAL *grad, const REAL *values, const int64_t *offsets,
                                  const int32_t *codes, const int32_t *query_codes,
                                  const int64_t *query_offsets, const int64_t *cuts,
                                  REAL *grad_values, int64_t users, int64_t groups,
                                  int64_t buckets, int64_t size, int64_t last, int threads) {
    const int64_t longest = largest_step(offsets, users);
    const int64_t most = largest_step(query_offsets, users);
    const int64_t kept = last < longest ? longest : 0;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Table table = table_new(buckets, size), gathered = table_new(buckets, size);
        uint8_t *zero = malloc((size_t)(longest + most) + 1), *found = zero + longest;
        double *gradients = malloc((size_t)((most + kept) * size) * sizeof(double) + 1);
        double *before = kept > 0 ? gradients + most * size : NULL;
        failed |= table_missing(table) || table_missing(gathered);
        failed |= zero == NULL || gradients == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < users; u++) {
            if (failed) continue;
            const int64_t rows = offsets[u + 1] - offsets[u];
            REAL *own = grad_values + offsets[u] * size;
            memset(own, 0, (size_t)(rows * size) * sizeof(REAL));
            NAME(find_zeros)(values + offsets[u] * size, rows, size, zero);
            for (int64_t g = 0; g < groups; g++) {
                const NAME(Walk) walk = NAME(walk_of)(values, zero, offsets, codes, query_codes,
                                                      query_offsets, cuts, u, g, groups, size,
                                                      last);
                NAME(row_gradients)(&walk, &table, grad + query_offsets[u] * size, found,
                                    gradients);
                NAME(attend_backward)(&walk, found, gradients, &gathered,
                                      last < rows ? before : NULL, own);
            }
        }
        free(zero);
        free(gradients);
        table_free(table);
        table_free(gathered);
    }
    return failed;
}

#endif
