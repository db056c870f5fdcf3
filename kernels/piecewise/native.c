/* Piecewise linear embeddings on CPUs. A thread takes whole columns of a network: it sums the bins
 * up once, and then a number reads two rows of a table, whatever the number of bins. Sums over rows
 * are in their order, so the result does not depend on the number of threads. The second half is
 * included twice, for float and for double.
 */
#ifndef REAL

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define REAL float
#define NAME(name) name##_float
#include "native.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_double
#include "native.c"

#else

/* A place as the last bin begun and the share of it that is filled; NaN stays NaN where there are
 * bins at all. */
static inline int64_t NAME(bin_of)(REAL place, int64_t bins, REAL *share) {
    if (!(place > 0) || bins == 0) {
        *share = place == place || bins == 0 ? 0 : place;
        return 0;
    }
    if (place >= (REAL)bins) {
        *share = 0;
        return bins;
    }
    const int64_t bin = (int64_t)place;
    *share = place - (REAL)bin;
    return bin;
}

/* Column i of all networks', and where its numbers lie: numbers may be the same for all. */
static inline int64_t NAME(numbers_at)(int64_t i, int64_t given, int64_t columns, int64_t rows) {
    return (given == 1 ? i % columns : i) * rows;
}

int NAME(embed)(const REAL *linear, const REAL *place, const uint8_t *missing, const REAL *weight,
                REAL *out, int64_t networks, int64_t given, int64_t columns, int64_t rows,
                int64_t bins, int64_t size, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        /* Row k: all bins before k, full; one more row of zeros stands for a bin after the last. */
        REAL *full = calloc((size_t)((bins + 2) * size + 1), sizeof(REAL));
        failed |= full == NULL;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < networks * columns; i++) {
            if (failed) continue;
            const REAL *w = weight + i * (bins + 2) * size, *none = full + (bins + 1) * size;
            for (int64_t k = 0; k < bins; k++)
                for (int64_t d = 0; d < size; d++)
                    full[(k + 1) * size + d] = full[k * size + d] + w[k * size + d];
            const REAL *slope = w + bins * size, *absent = slope + size;
            const int64_t at = NAME(numbers_at)(i, given, columns, rows);
            for (int64_t r = 0; r < rows; r++) {
                REAL share;
                const int64_t bin = NAME(bin_of)(place[at + r], bins, &share);
                const REAL *before = full + bin * size;
                const REAL *begun = bin < bins ? w + bin * size : none;
                const REAL *added = missing[at + r] ? absent : none;
                const REAL z = linear[at + r];
                REAL *to = out + (i * rows + r) * size;
                for (int64_t d = 0; d < size; d++)
                    to[d] = before[d] + share * begun[d] + z * slope[d] + added[d];
            }
        }
        free(full);
    }
    return failed;
}

int NAME(embed_backward)(const REAL *grad, const REAL *linear, const REAL *place,
                         const uint8_t *missing, REAL *found, int64_t networks, int64_t given,
                         int64_t columns, int64_t rows, int64_t bins, int64_t size, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        /* Row k: the gradient of the rows whose bins before k are full, and no other. */
        REAL *full = malloc((size_t)((bins + 1) * size + 1) * sizeof(REAL));
        failed |= full == NULL;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < networks * columns; i++) {
            if (failed) continue;
            REAL *to = found + i * (bins + 2) * size;
            REAL *slope = to + bins * size, *absent = slope + size;
            memset(to, 0, (size_t)((bins + 2) * size) * sizeof(REAL));
            memset(full, 0, (size_t)((bins + 1) * size) * sizeof(REAL));
            const int64_t at = NAME(numbers_at)(i, given, columns, rows);
            for (int64_t r = 0; r < rows; r++) {
                REAL share;
                const int64_t bin = NAME(bin_of)(place[at + r], bins, &share);
                const REAL *g = grad + (i * rows + r) * size;
                const REAL z = linear[at + r];
                REAL *before = full + bin * size;
                for (int64_t d = 0; d < size; d++) {
                    before[d] += g[d];
                    slope[d] += z * g[d];
                }
                if (bin < bins) {
                    REAL *begun = to + bin * size;
                    for (int64_t d = 0; d < size; d++) begun[d] += share * g[d];
                }
                if (missing[at + r])
                    for (int64_t d = 0; d < size; d++) absent[d] += g[d];
            }
            for (int64_t k = bins - 1; k >= 0; k--)
                for (int64_t d = 0; d < size; d++) {
                    to[k * size + d] += full[(k + 1) * size + d];
                    full[k * size + d] += full[(k + 1) * size + d];
                }
        }
        free(full);
    }
    return failed;
}

#endif
