/* Native sparse attention on CPUs. One thread serves one sequence and key head at a time, so the
 * result does not depend on the number of threads, and a key's gradient has one writer.
 *
 * All three branches are the same work: a tile of query rows against segments of keys, of which row
 * r sees the positions [low, high). The forward pass keeps each row's log-sum-exp and the chosen
 * blocks; the backward pass computes the scores again. Keys are packed once, as rows and as
 * columns, padded with zeros to whole vectors: every product then is of one kind, whole vectors of
 * the right factor times single numbers of the left one.
 *
 * The second half is included twice, for float and for double.
 */
#ifndef REAL

/* ISO C keeps products and sums apart, and branches for traps that nobody sets: both cost half the
 * speed of the tiles and of exp. */
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

enum { BYTES = 32, MAX_ROWS = 4, MAX_VECTORS = 2, TILE_ROWS = 16, BRANCHES = 3 };
enum { COMPRESSION, SELECTION, WINDOW };

/* The sizes of a call; names as in blocks.py, `n` compression blocks, `choices` selection blocks. */
typedef struct {
    int64_t batch, tokens, heads, group, size, value_size, n, block, stride, select_block, n_select,
        window, causal;
} Sizes;

typedef struct {
    int64_t start, count;
} Segment;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static inline int64_t count_blocks(const Sizes *s, int64_t length) {
    if (length == 0) return 0;
    return 1 + (most(length - s->block, 0) + s->stride - 1) / s->stride;
}

/* Compression blocks that the query at t sees, of `count`. */
static inline int64_t seen_blocks(const Sizes *s, int64_t t, int64_t count) {
    if (!s->causal) return count;
    return t + 1 < s->block ? 0 : least(count, (t + 1 - s->block) / s->stride + 1);
}

/* x >= 0 rounded to half precision, half to even, as torch converts: the ranks of blocks. */
static inline float as_half(float x) {
    const float small = (x + 0.5f) - 0.5f; /* floats there lie as far apart as the least halves */
    float large;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~(uint32_t)0x1fff;
    memcpy(&large, &bits, sizeof large);
    return x < 6.103515625e-05f ? small : large;
}

/* Keep the best `n` of what is offered in order of position: of equals, the first stays ahead. */
static inline void offer(float rank, int64_t j, float *ranks, int64_t *chosen, int64_t n) {
    if (!(rank > ranks[n - 1])) return;
    int64_t place = n - 1;
    for (; place > 0 && rank > ranks[place - 1]; place--) {
        ranks[place] = ranks[place - 1];
        chosen[place] = chosen[place - 1];
    }
    ranks[place] = rank;
    chosen[place] = j;
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
typedef REAL NAME(Vector) __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

/* c = a b, or c += a b, for `rows` rows and `vectors` vectors of columns; a's element (i, x) lies at
 * a[i * row + x * column]. The constants are known where this is inlined: sums stay in registers.
 * Few rows have several sums each, `ways`, or every product would wait for the one before. */
static inline __attribute__((always_inline)) void NAME(tile)(
    REAL *restrict c, int64_t ldc, const REAL *restrict a, int64_t row, int64_t column,
    const REAL *restrict b, int64_t ldb, int64_t inner, int add, const int rows,
    const int vectors) {
    const int ways = rows == 1 ? 4 : rows == 2 ? 2 : 1;
    NAME(Vector) sums[MAX_ROWS][MAX_ROWS][MAX_VECTORS] = {{{{0}}}};
    int64_t x = 0;
    for (; x + ways <= inner; x += ways)
#pragma GCC unroll 4
        for (int u = 0; u < ways; u++) {
            const NAME(Vector) *right = (const NAME(Vector) *)(b + (x + u) * ldb);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++)
                    sums[u][i][v] += a[i * row + (x + u) * column] * right[v];
        }
    for (; x < inner; x++)
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                sums[0][i][v] +=
                    a[i * row + x * column] * ((const NAME(Vector) *)(b + x * ldb))[v];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            NAME(Vector) *out = (NAME(Vector) *)(c + i * ldc) + v;
            NAME(Vector) sum = sums[0][i][v];
            if (ways == 2) sum += sums[1][i][v];
            if (ways == 4) sum = (sum + sums[1][i][v]) + (sums[2][i][v] + sums[3][i][v]);
            if (add) sum += *out;
            *out = sum;
        }
}

/* c [rows, columns] (+)= a [rows, inner] b [inner, columns]; columns are rounded up to whole vectors,
 * which b must hold and c have room for. */
static void NAME(product)(REAL *c, int64_t ldc, const REAL *a, int64_t row, int64_t column,
                          const REAL *b, int64_t ldb, int64_t rows, int64_t columns,
                          int64_t inner, int add) {
    const int64_t width = 2 * NAME(LANES);
    for (int64_t j = 0; j < columns; j += width)
        for (int64_t i = 0; i < rows; i += MAX_ROWS) {
            REAL *out = c + i * ldc + j;
            const REAL *left = a + i * row;
            const int narrow = columns - j <= NAME(LANES);
#define TILE(r)                                                                             \
    if (narrow)                                                                             \
        NAME(tile)(out, ldc, left, row, column, b + j, ldb, inner, add, r, 1);              \
    else                                                                                    \
        NAME(tile)(out, ldc, left, row, column, b + j, ldb, inner, add, r, 2);              \
    break;
            switch (least(rows - i, MAX_ROWS)) {
                case 1: TILE(1)
                case 2: TILE(2)
                case 3: TILE(3)
                default: TILE(4)
            }
#undef TILE
        }
}

/* Positions that compression and selection blocks share, over the stride. A strip of `width`
 * selection blocks shares some with the `band` compression blocks from first[strip] on only; its
 * weights are [band, width]. */
typedef struct {
    int64_t choices, width, strips, band, *first;
    REAL *weights;
} NAME(Overlap);

static int NAME(overlap_new)(NAME(Overlap) *o, const Sizes *s) {
    o->choices = (s->tokens + s->select_block - 1) / s->select_block;
    o->width = 2 * NAME(LANES);
    o->strips = (o->choices + o->width - 1) / o->width;
    o->band = least(s->n, (o->width * s->select_block + s->block) / s->stride + 1);
    o->first = malloc((size_t)o->strips * sizeof(int64_t));
    o->weights = malloc((size_t)(o->strips * o->band * o->width) * sizeof(REAL));
    if (o->first == NULL || o->weights == NULL) return 1;
    REAL *weight = o->weights;
    for (int64_t strip = 0; strip < o->strips; strip++) {
        const int64_t left = strip * o->width * s->select_block;
        o->first[strip] =
            left < s->block ? 0 : least(s->n - o->band, (left - s->block) / s->stride + 1);
        for (int64_t x = 0; x < o->band; x++)
            for (int64_t j = 0; j < o->width; j++) {
                const int64_t begin = (o->first[strip] + x) * s->stride;
                const int64_t start = left + j * s->select_block;
                const int64_t end = least(start + s->select_block, begin + s->block);
                *weight++ = (REAL)most(end - most(start, begin), 0) / (REAL)s->stride;
            }
    }
    return 0;
}

static void NAME(overlap_free)(NAME(Overlap) *o) { free(o->first), free(o->weights); }

/* Keys and values of one branch, sequence and head: rows [n, padded size] and columns
 * [size, padded n], and room for the gradients of the rows. */
typedef struct {
    int64_t n, columns, size, value_size, row, value_row;
    REAL *k, *kt, *v, *vt, *grad_k, *grad_v;
} NAME(Keys);

static int NAME(keys_new)(NAME(Keys) *keys, int64_t n, int64_t size, int64_t value_size,
                          int backward) {
    const int64_t lanes = NAME(LANES);
    *keys = (NAME(Keys)){.n = n, .columns = round_up(n, lanes) + 2 * lanes, .size = size,
                         .value_size = value_size, .row = round_up(size, lanes),
                         .value_row = round_up(value_size, lanes)};
    keys->kt = calloc((size_t)(keys->columns * size), sizeof(REAL));
    keys->v = calloc((size_t)(n * keys->value_row), sizeof(REAL));
    if (!backward) return keys->kt == NULL || keys->v == NULL;
    keys->k = calloc((size_t)(n * keys->row), sizeof(REAL));
    keys->vt = calloc((size_t)(keys->columns * value_size), sizeof(REAL));
    keys->grad_k = malloc((size_t)(n * keys->row) * sizeof(REAL));
    keys->grad_v = malloc((size_t)(n * keys->value_row) * sizeof(REAL));
    return keys->kt == NULL || keys->v == NULL || keys->k == NULL || keys->vt == NULL ||
           keys->grad_k == NULL || keys->grad_v == NULL;
}

static void NAME(keys_free)(NAME(Keys) *keys) {
    free(keys->kt), free(keys->v), free(keys->k), free(keys->vt);
    free(keys->grad_k), free(keys->grad_v);
}

/* Rows `stride` apart become rows and columns; from `length` on they are padding and count as 0. */
static void NAME(pack)(const REAL *from, int64_t stride, int64_t length, int64_t n, int64_t size,
                       REAL *rows, int64_t row, REAL *columns, int64_t column) {
    for (int64_t j = 0; rows != NULL && j < n; j++)
        if (j < length)
            memcpy(rows + j * row, from + j * stride, (size_t)size * sizeof(REAL));
        else
            memset(rows + j * row, 0, (size_t)size * sizeof(REAL));
    if (columns == NULL) return;
    for (int64_t first = 0; first < length; first += TILE_ROWS) {
        const int64_t end = least(first + TILE_ROWS, length);
        for (int64_t d = 0; d < size; d++)
            for (int64_t j = first; j < end; j++)
                columns[d * column + j] = from[j * stride + d];
    }
    for (int64_t d = 0; d < size && length < n; d++)
        memset(columns + d * column + length, 0, (size_t)(n - length) * sizeof(REAL));
}

static void NAME(keys_fill)(NAME(Keys) *keys, const REAL *k, const REAL *v, int64_t heads,
                            int64_t length) {
    NAME(pack)(k, heads * keys->size, length, keys->n, keys->size, keys->k, keys->row, keys->kt,
               keys->columns);
    NAME(pack)(v, heads * keys->value_size, length, keys->n, keys->value_size, keys->v,
               keys->value_row, keys->vt, keys->columns);
    if (keys->grad_k == NULL) return;
    memset(keys->grad_k, 0, (size_t)(keys->n * keys->row) * sizeof(REAL));
    memset(keys->grad_v, 0, (size_t)(keys->n * keys->value_row) * sizeof(REAL));
}

static void NAME(unpack)(const REAL *rows, int64_t row, int64_t n, int64_t size, REAL *to,
                         int64_t stride) {
    for (int64_t j = 0; j < n; j++)
        memcpy(to + j * stride, rows + j * row, (size_t)size * sizeof(REAL));
}

/* Query rows of one branch and what belongs to them: sums over keys are [rows, value_row]. */
typedef struct {
    int64_t rows;
    int64_t *low, *high;
    int64_t room;                /* columns of scores */
    REAL *q, *scores, *log_sums; /* q is scaled, [rows, row] */
    REAL *out, *grad_out;        /* [rows, value_row] */
    REAL *along, *grad_scores, *grad_q; /* along is grad_out . out */
} NAME(Tile);

static NAME(Tile) NAME(tile_from)(const NAME(Tile) *all, int64_t first, int64_t rows,
                                  const NAME(Keys) *keys) {
    NAME(Tile) part = *all;
    part.rows = rows;
    part.low += first, part.high += first, part.log_sums += first, part.along += first;
    part.q += first * keys->row;
    part.out += first * keys->value_row;
    part.grad_out += first * keys->value_row;
    part.grad_q += first * keys->row;
    return part;
}

static int64_t NAME(scores)(const NAME(Tile) *t, const NAME(Keys) *keys, const Segment *segments,
                            int64_t n) {
    int64_t column = 0;
    for (int64_t s = 0; s < n; s++) {
        const int64_t start = segments[s].start, count = segments[s].count;
        NAME(product)(t->scores + column, t->room, t->q, keys->row, 1, keys->kt + start,
                      keys->columns, t->rows, count, keys->size, 0);
        for (int64_t r = 0; r < t->rows; r++) {
            REAL *row = t->scores + r * t->room + column;
            for (int64_t j = 0; j < least(count, t->low[r] - start); j++) row[j] = -INFINITY;
            for (int64_t j = most(0, t->high[r] - start); j < count; j++) row[j] = -INFINITY;
        }
        column += count;
    }
    return column;
}

/* exp(x - shift) in place; returns the sum. */
static REAL NAME(exponentials)(REAL *restrict x, int64_t n, REAL shift) {
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) {
        x[j] = NAME(exp)(x[j] - shift);
        sum += x[j];
    }
    return sum;
}

/* Scores become weights; a row that sees nothing has none, and 0 as its log-sum-exp. */
static REAL NAME(softmax)(REAL *restrict x, int64_t n) {
    REAL top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; j++) top = x[j] > top ? x[j] : top;
    if (top == -INFINITY) {
        for (int64_t j = 0; j < n; j++) x[j] = 0;
        return 0;
    }
    const REAL sum = NAME(exponentials)(x, n, top), inverse = 1 / sum;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) x[j] *= inverse;
    return top + (REAL)log((double)sum);
}

/* out = softmax(q k^T) v over the segments; the weights stay in scores. */
static void NAME(attend)(const NAME(Tile) *t, const NAME(Keys) *keys, const Segment *segments,
                         int64_t n) {
    const int64_t columns = NAME(scores)(t, keys, segments, n);
    for (int64_t r = 0; r < t->rows; r++)
        t->log_sums[r] = NAME(softmax)(t->scores + r * t->room, columns);
    memset(t->out, 0, (size_t)(t->rows * keys->value_row) * sizeof(REAL));
    for (int64_t s = 0, column = 0; s < n; column += segments[s++].count)
        NAME(product)(t->out, keys->value_row, t->scores + column, t->room, 1,
                      keys->v + segments[s].start * keys->value_row, keys->value_row, t->rows,
                      keys->value_size, segments[s].count, 1);
}

/* Add to the gradients of q, k and v. */
static void NAME(attend_backward)(const NAME(Tile) *t, const NAME(Keys) *keys,
                                  const Segment *segments, int64_t n) {
    const int64_t columns = NAME(scores)(t, keys, segments, n);
    for (int64_t s = 0, column = 0; s < n; column += segments[s++].count)
        NAME(product)(t->grad_scores + column, t->room, t->grad_out, keys->value_row, 1,
                      keys->vt + segments[s].start, keys->columns, t->rows, segments[s].count,
                      keys->value_size, 0);
    for (int64_t r = 0; r < t->rows; r++) {
        REAL *restrict weights = t->scores + r * t->room;
        REAL *restrict grad = t->grad_scores + r * t->room;
        const REAL along = t->along[r];
        NAME(exponentials)(weights, columns, t->log_sums[r]);
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) grad[j] = weights[j] * (grad[j] - along);
    }
    for (int64_t s = 0, column = 0; s < n; column += segments[s++].count) {
        const int64_t start = segments[s].start, count = segments[s].count;
        NAME(product)(t->grad_q, keys->row, t->grad_scores + column, t->room, 1,
                      keys->k + start * keys->row, keys->row, t->rows, keys->size, count, 1);
        NAME(product)(keys->grad_v + start * keys->value_row, keys->value_row,
                      t->scores + column, 1, t->room, t->grad_out, keys->value_row, count,
                      keys->value_size, t->rows, 1);
        NAME(product)(keys->grad_k + start * keys->row, keys->row, t->grad_scores + column, 1,
                      t->room, t->q, keys->row, count, keys->size, t->rows, 1);
    }
}

/* What a thread needs, for the tile of queries from t0 up to t1 of one sequence and key head. */
typedef struct {
    const Sizes *sizes;
    int64_t length, count, t0, t1; /* positions and compression blocks that are no padding */
    NAME(Keys) keys[BRANCHES];
    NAME(Tile) tile;
    REAL *shares, *importance; /* of each query: weights summed over its group; of its blocks */
    REAL *grad;                /* upstream, [rows, value_row] */
    float *ranks;
    Segment *segments;
} NAME(Work);

static int64_t NAME(tile_tokens)(const Sizes *s) { return most(1, TILE_ROWS / s->group); }

static int NAME(work_new)(NAME(Work) *w, const Sizes *s, int backward) {
    *w = (NAME(Work)){.sizes = s};
    int failed = 0;
    for (int c = 0; c < BRANCHES; c++)
        failed |= NAME(keys_new)(&w->keys[c], c == COMPRESSION ? s->n : s->tokens, s->size,
                                 s->value_size, backward);
    const int64_t tokens = NAME(tile_tokens)(s), rows = tokens * s->group;
    const int64_t reach = most(s->n, most(least(s->tokens, s->n_select * s->select_block),
                                          least(s->tokens, 2 * s->window + tokens)));
    NAME(Tile) *t = &w->tile;
    t->room = round_up(reach, NAME(LANES)) + 2 * NAME(LANES);
    const size_t real = sizeof(REAL), size = (size_t)(rows * w->keys->row),
                 value_size = (size_t)(rows * w->keys->value_row);
    t->low = malloc((size_t)rows * sizeof(int64_t)), t->high = malloc((size_t)rows * sizeof(int64_t));
    t->q = calloc(size, real), t->grad_q = calloc(size, real);
    t->scores = malloc((size_t)(rows * t->room) * real);
    t->grad_scores = malloc((size_t)(rows * t->room) * real);
    t->out = calloc(value_size, real), t->grad_out = calloc(value_size, real);
    t->log_sums = malloc((size_t)rows * real), t->along = malloc((size_t)rows * real);
    w->grad = calloc(value_size, real), w->shares = calloc((size_t)(tokens * s->n), real);
    const int64_t choices = (s->tokens + s->select_block - 1) / s->select_block;
    const int64_t strips = round_up(choices, 2 * NAME(LANES));
    w->importance = malloc((size_t)(tokens * strips) * real);
    w->ranks = malloc((size_t)s->n_select * sizeof(float));
    w->segments = malloc((size_t)s->n_select * sizeof(Segment));
    return failed || t->low == NULL || t->high == NULL || t->q == NULL || t->grad_q == NULL ||
           t->scores == NULL || t->grad_scores == NULL || t->out == NULL || t->grad_out == NULL ||
           t->log_sums == NULL || t->along == NULL || w->grad == NULL || w->shares == NULL ||
           w->importance == NULL || w->ranks == NULL || w->segments == NULL;
}

static void NAME(work_free)(NAME(Work) *w) {
    NAME(Tile) *t = &w->tile;
    for (int c = 0; c < BRANCHES; c++) NAME(keys_free)(&w->keys[c]);
    free(t->low), free(t->high), free(t->q), free(t->grad_q), free(t->scores);
    free(t->grad_scores), free(t->out), free(t->grad_out), free(t->log_sums), free(t->along);
    free(w->grad), free(w->shares), free(w->importance), free(w->ranks), free(w->segments);
}

/* Begin with sequence b and key head h; k and v of each branch are [B, n, heads, size]. */
static void NAME(work_begin)(NAME(Work) *w, int64_t b, int64_t h, int64_t length,
                             const REAL *const *k, const REAL *const *v) {
    const Sizes *s = w->sizes;
    w->length = length, w->count = count_blocks(s, length);
    for (int c = 0; c < BRANCHES; c++) {
        NAME(Keys) *keys = &w->keys[c];
        const int64_t first = b * keys->n * s->heads + h;
        NAME(keys_fill)(keys, k[c] + first * s->size, v[c] + first * s->value_size, s->heads,
                        c == COMPRESSION ? w->count : length);
    }
}

/* Where row r of the tile lies among the B T H rows of queries. */
static int64_t NAME(query)(const NAME(Work) *w, int64_t b, int64_t h, int64_t r) {
    const Sizes *s = w->sizes;
    const int64_t t = w->t0 + r / s->group;
    return ((b * s->tokens + t) * s->heads + h) * s->group + r % s->group;
}

static void NAME(tile_begin)(NAME(Work) *w, int64_t b, int64_t h, const REAL *q, REAL scale) {
    const Sizes *s = w->sizes;
    w->tile.rows = (w->t1 - w->t0) * s->group;
    for (int64_t r = 0; r < w->tile.rows; r++) {
        const REAL *restrict from = q + NAME(query)(w, b, h, r) * s->size;
        REAL *restrict to = w->tile.q + r * w->keys->row;
        for (int64_t d = 0; d < s->size; d++) to[d] = scale * from[d];
    }
}

/* Set what the rows see in the compression or window branch; return the keys that any of them does. */
static Segment NAME(sight)(NAME(Work) *w, int branch) {
    const Sizes *s = w->sizes;
    int64_t low = INT64_MAX, high = 0;
    for (int64_t r = 0; r < w->tile.rows; r++) {
        const int64_t t = w->t0 + r / s->group;
        int64_t begin = 0, end = seen_blocks(s, t, w->count);
        if (branch == WINDOW) {
            begin = most(0, t - s->window + 1);
            end = least(w->length, s->causal ? t + 1 : t + s->window);
        }
        w->tile.low[r] = begin, w->tile.high[r] = end;
        low = least(low, begin), high = most(high, end);
    }
    return (Segment){low, high - low};
}

/* Set what the rows at t see of the blocks chosen for them; return the number of blocks. */
static int64_t NAME(selected)(NAME(Work) *w, int64_t t, const int64_t *chosen, NAME(Tile) *part) {
    const Sizes *s = w->sizes;
    *part = NAME(tile_from)(&w->tile, (t - w->t0) * s->group, s->group, &w->keys[SELECTION]);
    for (int64_t g = 0; g < s->group; g++)
        part->low[g] = 0, part->high[g] = s->causal ? t + 1 : w->length;
    int64_t n = 0;
    for (; n < s->n_select && chosen[n] >= 0; n++) {
        const int64_t start = chosen[n] * s->select_block;
        w->segments[n] = (Segment){start, least(s->select_block, w->length - start)};
    }
    return n;
}

/* Compute the importance of all blocks to the tile's queries from the weights of compressed ones. */
static void NAME(weigh)(NAME(Work) *w, const NAME(Overlap) *o, int64_t seen) {
    const Sizes *s = w->sizes;
    const NAME(Tile) *tile = &w->tile;
    for (int64_t t = 0; t < w->t1 - w->t0; t++) {
        REAL *restrict shares = w->shares + t * s->n;
        const REAL *restrict weights = tile->scores + t * s->group * tile->room;
        for (int64_t i = 0; i < seen; i++) shares[i] = weights[i];
        for (int64_t g = 1; g < s->group; g++)
            for (int64_t i = 0; i < seen; i++) shares[i] += weights[g * tile->room + i];
        for (int64_t i = seen; i < s->n; i++) shares[i] = 0;
    }
    for (int64_t strip = 0; strip < o->strips; strip++)
        NAME(product)(w->importance + strip * o->width, o->strips * o->width,
                      w->shares + o->first[strip], s->n, 1,
                      o->weights + strip * o->band * o->width, o->width, w->t1 - w->t0, o->width,
                      o->band, 0);
}

/* Choose the blocks of the query at t. */
static void NAME(choose)(NAME(Work) *w, int64_t t, const NAME(Overlap) *o, int64_t *chosen) {
    const Sizes *s = w->sizes;
    REAL *restrict importance = w->importance + (t - w->t0) * o->strips * o->width;
    const int64_t own = t / s->select_block;
    const int64_t end = (s->causal ? t : w->length - 1) / s->select_block + 1;
#pragma omp simd
    for (int64_t j = 0; j < end; j++) importance[j] = as_half((float)importance[j]);
    for (int64_t i = 0; i < s->n_select; i++) w->ranks[i] = -1, chosen[i] = -1;
    offer(INFINITY, own, w->ranks, chosen, s->n_select);
    for (int64_t j = 0; j < end; j++)
        if (j != own) offer((float)importance[j], j, w->ranks, chosen, s->n_select);
}

/* Write a branch's rows, and add them times their gates to the result. */
static void NAME(store)(const NAME(Work) *w, int64_t b, int64_t h, int branch, const REAL *gates,
                        REAL *log_sums, REAL *branches, REAL *out) {
    const Sizes *s = w->sizes;
    const int64_t queries = s->batch * s->tokens * s->heads * s->group;
    for (int64_t r = 0; r < w->tile.rows; r++) {
        const int64_t i = NAME(query)(w, b, h, r), size = s->value_size;
        const REAL gate = gates[i * BRANCHES + branch];
        const REAL *restrict from = w->tile.out + r * w->keys->value_row;
        REAL *restrict to = branches + (branch * queries + i) * size;
        REAL *restrict sum = out + i * size;
        log_sums[branch * queries + i] = w->tile.log_sums[r];
        for (int64_t d = 0; d < size; d++) to[d] = from[d], sum[d] += gate * from[d];
    }
}

/* Read a branch's rows back, and give each its share of the upstream gradient. */
static void NAME(load)(NAME(Work) *w, int64_t b, int64_t h, int branch, const REAL *gates,
                       const REAL *log_sums, const REAL *branches, REAL *grad_gates) {
    const Sizes *s = w->sizes;
    const int64_t queries = s->batch * s->tokens * s->heads * s->group;
    for (int64_t r = 0; r < w->tile.rows; r++) {
        const int64_t i = NAME(query)(w, b, h, r), size = s->value_size;
        const REAL gate = gates[i * BRANCHES + branch];
        const REAL *restrict out = branches + (branch * queries + i) * size;
        const REAL *restrict grad = w->grad + r * w->keys->value_row;
        REAL *restrict to = w->tile.grad_out + r * w->keys->value_row;
        REAL along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < size; d++) along += grad[d] * out[d], to[d] = gate * grad[d];
        grad_gates[i * BRANCHES + branch] = along;
        w->tile.along[r] = gate * along;
        w->tile.log_sums[r] = log_sums[branch * queries + i];
    }
}

#define SIZES                                                                                    \
    int64_t batch, int64_t tokens, int64_t heads, int64_t group, int64_t size,                   \
        int64_t value_size, int64_t n, int64_t block, int64_t stride, int64_t select_block,      \
        int64_t n_select, int64_t window, int64_t causal
#define GIVEN_SIZES                                                                              \
    (Sizes) {                                                                                    \
        batch, tokens, heads, group, size, value_size, n, block, stride, select_block, n_select, \
            window, causal                                                                       \
    }

/* Results come zeroed, chosen blocks filled with -1: that is what padding has. */
int NAME(nsa_attend)(const REAL *q, const REAL *k_compressed, const REAL *v_compressed,
                     const REAL *k_selection, const REAL *v_selection, const REAL *k_window,
                     const REAL *v_window, const REAL *gates, const int64_t *lengths,
                     const REAL *scale, REAL *branches, REAL *log_sums, int64_t *chosen, REAL *out,
                     SIZES, int threads) {
    const Sizes sizes = GIVEN_SIZES;
    const REAL *k[] = {k_compressed, k_selection, k_window};
    const REAL *v[] = {v_compressed, v_selection, v_window};
    NAME(Overlap) overlap;
    int failed = NAME(overlap_new)(&overlap, &sizes);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        NAME(Work) work, *w = &work;
        NAME(Tile) part;
        failed |= NAME(work_new)(w, &sizes, 0);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < batch * heads; i++) {
            if (failed) continue;
            const int64_t b = i / heads, h = i % heads;
            NAME(work_begin)(w, b, h, lengths[b], k, v);
            for (w->t0 = 0; w->t0 < w->length; w->t0 = w->t1) {
                w->t1 = least(w->t0 + NAME(tile_tokens)(&sizes), w->length);
                NAME(tile_begin)(w, b, h, q, *scale);
                Segment segment = NAME(sight)(w, COMPRESSION);
                NAME(attend)(&w->tile, &w->keys[COMPRESSION], &segment, 1);
                NAME(store)(w, b, h, COMPRESSION, gates, log_sums, branches, out);
                NAME(weigh)(w, &overlap, segment.start + segment.count);
                for (int64_t t = w->t0; t < w->t1; t++)
                    NAME(choose)(w, t, &overlap,
                                 chosen + ((b * tokens + t) * heads + h) * n_select);
                for (int64_t t = w->t0; t < w->t1; t++) {
                    const int64_t *own = chosen + ((b * tokens + t) * heads + h) * n_select;
                    const int64_t blocks = NAME(selected)(w, t, own, &part);
                    NAME(attend)(&part, &w->keys[SELECTION], w->segments, blocks);
                }
                NAME(store)(w, b, h, SELECTION, gates, log_sums, branches, out);
                segment = NAME(sight)(w, WINDOW);
                NAME(attend)(&w->tile, &w->keys[WINDOW], &segment, 1);
                NAME(store)(w, b, h, WINDOW, gates, log_sums, branches, out);
            }
        }
        NAME(work_free)(w);
    }
    NAME(overlap_free)(&overlap);
    return failed;
}

/* Gradients of queries and gates come zeroed; those of keys and values are written whole. */
int NAME(nsa_attend_backward)(
    const REAL *grad, const REAL *branches, const REAL *log_sums, const int64_t *chosen,
    const REAL *q, const REAL *k_compressed, const REAL *v_compressed, const REAL *k_selection,
    const REAL *v_selection, const REAL *k_window, const REAL *v_window, const REAL *gates,
    const int64_t *lengths, const REAL *scale, REAL *grad_k_compressed, REAL *grad_v_compressed,
    REAL *grad_k_selection, REAL *grad_v_selection, REAL *grad_k_window, REAL *grad_v_window,
    REAL *grad_gates, REAL *grad_q, SIZES, int threads) {
    const Sizes sizes = GIVEN_SIZES;
    const REAL *k[] = {k_compressed, k_selection, k_window};
    const REAL *v[] = {v_compressed, v_selection, v_window};
    REAL *grad_k[] = {grad_k_compressed, grad_k_selection, grad_k_window};
    REAL *grad_v[] = {grad_v_compressed, grad_v_selection, grad_v_window};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        NAME(Work) work, *w = &work;
        NAME(Tile) part;
        failed |= NAME(work_new)(w, &sizes, 1);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < batch * heads; i++) {
            if (failed) continue;
            const int64_t b = i / heads, h = i % heads;
            NAME(work_begin)(w, b, h, lengths[b], k, v);
            for (w->t0 = 0; w->t0 < w->length; w->t0 = w->t1) {
                w->t1 = least(w->t0 + NAME(tile_tokens)(&sizes), w->length);
                NAME(tile_begin)(w, b, h, q, *scale);
                memset(w->tile.grad_q, 0, (size_t)(w->tile.rows * w->keys->row) * sizeof(REAL));
                for (int64_t r = 0; r < w->tile.rows; r++)
                    memcpy(w->grad + r * w->keys->value_row,
                           grad + NAME(query)(w, b, h, r) * value_size,
                           (size_t)value_size * sizeof(REAL));
                for (int c = 0; c < BRANCHES; c++) {
                    NAME(load)(w, b, h, c, gates, log_sums, branches, grad_gates);
                    if (c == SELECTION) {
                        for (int64_t t = w->t0; t < w->t1; t++) {
                            const int64_t *own =
                                chosen + ((b * tokens + t) * heads + h) * n_select;
                            const int64_t blocks = NAME(selected)(w, t, own, &part);
                            NAME(attend_backward)(&part, &w->keys[c], w->segments, blocks);
                        }
                        continue;
                    }
                    const Segment segment = NAME(sight)(w, c);
                    NAME(attend_backward)(&w->tile, &w->keys[c], &segment, 1);
                }
                for (int64_t r = 0; r < w->tile.rows; r++) {
                    const REAL *restrict from = w->tile.grad_q + r * w->keys->row;
                    REAL *restrict to = grad_q + NAME(query)(w, b, h, r) * size;
                    for (int64_t d = 0; d < size; d++) to[d] = *scale * from[d];
                }
            }
            for (int c = 0; c < BRANCHES; c++) {
                const NAME(Keys) *keys = &w->keys[c];
                const int64_t first = b * keys->n * heads + h;
                NAME(unpack)(keys->grad_k, keys->row, keys->n, size, grad_k[c] + first * size,
                             heads * size);
                NAME(unpack)(keys->grad_v, keys->value_row, keys->n, value_size,
                             grad_v[c] + first * value_size, heads * value_size);
            }
        }
        NAME(work_free)(w);
    }
    return failed;
}

#undef SIZES
#undef GIVEN_SIZES
#endif
