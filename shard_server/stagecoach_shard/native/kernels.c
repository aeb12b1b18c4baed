// Decoder layers on a CPU: weights and K/V are bfloat16, everything in between is float32.
//
// Why not oneDNN or torch: with few tokens a layer costs what reading its weights costs, and their kernels read at
// little more than half of what a core can; with many, most CPUs without matrix units multiply bfloat16 at half their
// float32 rate. Here bfloat16 is widened in registers and multiplied in float32, in one pass over each weight.
// Attention walks the block tables, so that nothing is gathered.
//
// A row's result does not depend on what else is in the micro-batch, as every sum is taken in the order of its inputs.
//
// This is plain C with the vector extensions of GCC and clang. One register holds `LANES` floats, which follows from
// the CPU that the compiler is told to build for.

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define MAX_TILE 12  // rows of a tile: two accumulators each, of 32 registers
#elif defined(__AVX2__)
#define LANES 8
#define MAX_TILE 6
#else
#define LANES 4
#define MAX_TILE 8
#endif
#define PANEL (2 * LANES)  // output columns computed together
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint32_t vpair __attribute__((vector_size(4 * LANES), aligned(2), may_alias));  // of bfloat16, written as such

enum { OK = 0, NO_MEMORY = 1 };

// Weights of one layer. `window`: how many positions a token sees, 0 for all. A bias or head norm that the layer does
// not have is NULL.
typedef struct {
  int64_t hidden, inner, heads, kv_heads, head_dim, window;
  const uint32_t *qkv, *output, *gate_up, *down;  // packed
  const uint32_t *after;  // the weight that is read after this layer, or NULL
  const float *qkv_bias, *output_bias, *gate_up_bias, *down_bias;
  const float *input_norm, *mlp_norm, *query_norm, *key_norm;
  float eps;
} Layer;

// One micro-batch. Row i has the num_tokens[i] tokens from first_tokens[i] on, at the positions from starts[i] on.
typedef struct {
  int64_t total_tokens, num_rows, block_size, table_width, num_threads;
  const int64_t *starts, *num_tokens, *first_tokens;  // [num_rows]
  const int32_t *block_tables;                        // [num_rows, table_width]
  const int64_t *cache_slots;                         // [total_tokens]: block * block_size + offset
  const float *cos, *sin;                             // [total_tokens, head_dim / 2]
} Step;

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf v) { *(vf *)p = v; }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf load_bf16(const uint16_t *p) { return (vf)(__builtin_convertvector(*(const vh *)p, vu) << 16); }

// Rounds to the nearest bfloat16, ties to even. A NaN stays a NaN.
INLINE void store_bf16(uint16_t *p, vf v) {
  vu bits = (vu)v;
  vu rounded = bits + 0x7fff + ((bits >> 16) & 1);
  vu nan = (vu)((bits & 0x7fffffff) > 0x7f800000);
  *(vh *)p = __builtin_convertvector(((rounded & ~nan) | ((bits | 0x400000) & nan)) >> 16, vh);
}

// Picks numbers by their place among those of `a` followed by those of `b`. GCC knows clang's name for it only from 12
// on.
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

// The sum of a vector's numbers: its halves are added until one number is left.
INLINE float sum(vf v) {
#if LANES == 16
  v += PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
#elif LANES == 8
  v += PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
  return (v[0] + v[2]) + (v[1] + v[3]);
}

// The sums of LANES vectors, as one vector.
INLINE vf sums(const vf *v) {
#if LANES == 16
  // Pairs of vectors are folded into one of half sums, four times.
  vf a[8], b[4], c[2];
  for (int i = 0; i < 8; i++)
    a[i] = PICK(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PICK(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    b[i] = PICK(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           PICK(a[2 * i], a[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    c[i] = PICK(b[2 * i], b[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           PICK(b[2 * i], b[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  return PICK(c[0], c[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         PICK(c[0], c[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  vf all;
  for (int i = 0; i < LANES; i++) all[i] = sum(v[i]);
  return all;
#endif
}

INLINE float top_of(vf v) {
  float s[LANES], top;
  store(s, v);
  top = s[0];
  for (int i = 1; i < LANES; i++) top = s[i] > top ? s[i] : top;
  return top;
}

INLINE vf either(vi where, vf a, vf b) { return (vf)(((vu)a & (vu)where) | ((vu)b & ~(vu)where)); }
INLINE vf larger(vf a, vf b) { return either(a < b, b, a); }  // where `a` is a NaN, so is the result

// e^x for x <= 0, to about one unit in the last place: 2^n * p(r), r = x - n ln 2. Below -87, where it is less than
// 2^-125, it is exactly zero, so that what is masked weighs nothing whatever it is multiplied by. A NaN stays a NaN.
INLINE vf exp_(vf x) {
  vi none = x < -87.0f;
  x = larger(x, splat(-87.0f));
  vf n = x * 1.44269504f;
  vi whole = __builtin_convertvector(n - 0.5f, vi);  // truncates towards zero: n <= 0 is rounded to nearest
  n = __builtin_convertvector(whole, vf);
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return either(none, splat(0), (vf)((vi)p + (whole << 23)));
}

enum { TILED = 0, NORMED, QUERIES, ATTENDED, PROJECTED, ACTIVE, ATTENTION, SLOTS, WIDE, NUM_SCRATCH };

typedef struct { float *at; size_t size; } Held;

static pthread_key_t held_key;
static pthread_once_t held_once = PTHREAD_ONCE_INIT;

static void free_held(void *of_thread) {
  for (int which = 0; which < NUM_SCRATCH; which++) free(((Held *)of_thread)[which].at);
  free(of_thread);
}

static void make_held_key(void) { pthread_key_create(&held_key, free_held); }

// Memory of this thread for one purpose. It is kept from call to call, only grows, and goes with the thread: a shard
// that is given other layers computes them on new threads.
static float *scratch(int which, size_t floats) {
  static _Thread_local Held *held;
  if (held == NULL) {
    pthread_once(&held_once, make_held_key);
    Held *fresh = calloc(NUM_SCRATCH, sizeof(Held));
    if (fresh == NULL || pthread_setspecific(held_key, fresh) != 0) return free(fresh), NULL;
    held = fresh;
  }
  if (held[which].size < floats) {
    free(held[which].at);
    held[which].size = 0;
    size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    held[which].at = aligned_alloc(64, bytes);
    if (held[which].at == NULL) return NULL;
    held[which].size = floats;
  }
  return held[which].at;
}

// ---- linear

int64_t lanes(void) { return LANES; }

int64_t packed_words(int64_t rows, int64_t columns) { return (rows + PANEL - 1) / PANEL * columns * LANES; }

// weight [rows, columns] bfloat16 -> panels of PANEL rows, each [columns, LANES]: a word holds rows j and j + LANES.
void pack(const uint16_t *weight, int64_t rows, int64_t columns, uint32_t *packed) {
  for (int64_t first = 0; first < rows; first += PANEL)
    for (int64_t k = 0; k < columns; k++)
      for (int64_t j = 0; j < LANES; j++) {
        int64_t low = first + j, high = first + j + LANES;
        uint32_t word = low < rows ? weight[low * columns + k] : 0;
        if (high < rows) word |= (uint32_t)weight[high * columns + k] << 16;
        *packed++ = word;
      }
}

// Row k of a panel, in two registers. A panel holds pairs of bfloat16, or floats [depth, PANEL] where it is `wide`.
INLINE void panel_row(int wide, const void *panel, int64_t k, vf *low, vf *high) {
  if (wide) {
    *low = load((const float *)panel + k * PANEL);
    *high = load((const float *)panel + k * PANEL + LANES);
  } else {
    vu words = *(const vu *)((const uint32_t *)panel + k * LANES);
    *low = (vf)(words << 16);
    *high = (vf)(words & 0xffff0000u);
  }
}

// What a tile prefetches for later: from `at` on, `step` bytes further for each row of its panel.
typedef struct {
  const char *at;
  int64_t step;
} Ahead;

// (low, high)[i] += sum over k of a[i * step_i + k * step_k] * panel[k], for i < rows, which is a constant after
// inlining.
INLINE void tile(const int rows, int wide, const float *a, int64_t step_i, int64_t step_k, const void *panel,
                 int64_t depth, Ahead ahead, vf *restrict low, vf *restrict high) {
  vf l[MAX_TILE], h[MAX_TILE];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) l[i] = low[i], h[i] = high[i];
  for (int64_t k = 0; k < depth; k++) {
    vf pl, ph;
    panel_row(wide, panel, k, &pl, &ph);
    if (ahead.at) __builtin_prefetch(ahead.at + k * ahead.step, 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      vf x = splat(a[i * step_i + k * step_k]);
      l[i] += x * pl;
      h[i] += x * ph;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) low[i] = l[i], high[i] = h[i];
}

// From this many tiles on, a panel is widened to floats once for all of them.
#define MIN_WIDE_TILES 4

#define EACH_TILE(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#define TILED_CASE(R) \
  case R: \
    if (R <= MAX_TILE) tile(R <= MAX_TILE ? R : 1, 0, a, 1, R, panel, depth, ahead, low, high); \
    break;

#define WIDE_CASE(R) \
  case R: \
    if (R <= MAX_TILE) tile(R <= MAX_TILE ? R : 1, 1, a, 1, R, panel, depth, ahead, low, high); \
    break;

// A tile against a panel of bfloat16. `a` [depth, rows].
static void narrow_tile(int rows, const float *a, const uint32_t *panel, int64_t depth, Ahead ahead, vf *low, vf *high) {
  switch (rows) { EACH_TILE(TILED_CASE) }
}

// A tile against a panel of floats. `a` [depth, rows].
static void wide_tile(int rows, const float *a, const float *panel, int64_t depth, Ahead ahead, vf *low, vf *high) {
  switch (rows) { EACH_TILE(WIDE_CASE) }
}

static void widen_panel(const uint32_t *panel, int64_t depth, float *wide) {
  for (int64_t k = 0; k < depth; k++, wide += PANEL) {
    vf low, high;
    panel_row(0, panel, k, &low, &high);
    store(wide, low), store(wide + LANES, high);
  }
}

INLINE int64_t tiles_of(int64_t rows) { return (rows + MAX_TILE - 1) / MAX_TILE; }
INLINE int64_t tile_start(int64_t rows, int64_t tiles, int64_t t) { return rows * t / tiles; }

// x [rows, depth] -> tiles [depth, rows of the tile], one after the other, so that what a tile broadcasts lies
// together.
static void into_tiles(const float *x, int64_t rows, int64_t depth, float *tiled) {
  int64_t tiles = tiles_of(rows);
  for (int64_t t = 0; t < tiles; t++) {
    int64_t first = tile_start(rows, tiles, t), n = tile_start(rows, tiles, t + 1) - first;
    float *to = tiled + first * depth;
    for (int64_t i = 0; i < n; i++)
      for (int64_t k = 0; k < depth; k++) to[k * n + i] = x[(first + i) * depth + k];
  }
}

// y [rows, columns] = x [rows, depth] @ weight.T + bias, added to what is in y if `add`. `after` is the weight that is
// read next, or NULL.
int linear(const float *x, int64_t rows, const uint32_t *packed, int64_t columns, int64_t depth, const float *bias,
           float *y, int64_t add, const uint32_t *after, int64_t num_threads) {
  const float *tiled = x;
  if (rows > 1) {
    float *to = scratch(TILED, rows * depth);
    if (to == NULL) return NO_MEMORY;
    into_tiles(x, rows, depth, to);
    tiled = to;
  }
  int64_t panels = (columns + PANEL - 1) / PANEL, tiles = tiles_of(rows);
  int status = OK;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(static) reduction(max : status)
  for (int64_t p = 0; p < panels; p++) {
    const uint32_t *panel = packed + p * depth * LANES;
    int64_t width = columns - p * PANEL < PANEL ? columns - p * PANEL : PANEL;
    vf bias_low = {0}, bias_high = {0};
    if (bias != NULL) {
      float both[PANEL] = {0};
      memcpy(both, bias + p * PANEL, width * sizeof(float));
      bias_low = load(both), bias_high = load(both + LANES);
    }
    float *wide = NULL;
    if (tiles >= MIN_WIDE_TILES) {
      wide = scratch(WIDE, depth * PANEL);
      if (wide == NULL) {
        status = NO_MEMORY;
        continue;
      }
      widen_panel(panel, depth, wide);
    }
    for (int64_t t = 0; t < tiles; t++) {
      int64_t first = tile_start(rows, tiles, t), n = tile_start(rows, tiles, t + 1) - first;
      vf low[MAX_TILE], high[MAX_TILE];
      for (int64_t i = 0; i < n; i++) low[i] = bias_low, high[i] = bias_high;
      // Each tile fetches its part of the next panel, so that memory is read while all of them compute.
      const uint32_t *next = p + 1 < panels ? panel + depth * LANES : after;
      Ahead ahead = {(const char *)next + t * depth * LANES * 4 / tiles, LANES * 4 / tiles};
      if (next == NULL) ahead = (Ahead){(const char *)panel, 0};
      if (wide)
        wide_tile(n, tiled + first * depth, wide, depth, ahead, low, high);
      else
        narrow_tile(n, tiled + first * depth, panel, depth, ahead, low, high);
      for (int64_t i = 0; i < n; i++) {
        float *to = y + (first + i) * columns + p * PANEL;
        if (width == PANEL) {
          store(to, add ? load(to) + low[i] : low[i]);
          store(to + LANES, add ? load(to + LANES) + high[i] : high[i]);
        } else {
          float both[PANEL];
          store(both, low[i]), store(both + LANES, high[i]);
          for (int64_t j = 0; j < width; j++) to[j] = (add ? to[j] : 0.0f) + both[j];
        }
      }
    }
  }
  return status;
}

// ---- what is between the products

// y = x / sqrt(mean(x^2) + eps) * weight, for each row of `size`. y may be x.
void norm(const float *x, int64_t rows, int64_t size, const float *weight, float eps, float *y) {
  for (int64_t row = 0; row < rows; row++, x += size, y += size) {
    vf squares = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < size; i++) total += x[i] * x[i];
    float scale = 1.0f / sqrtf(total / size + eps);
    for (i = 0; i + LANES <= size; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < size; i++) y[i] = x[i] * scale * weight[i];
  }
}

// Rotates a head: number i together with number i + size / 2.
INLINE void turn(const float *x, int64_t size, const float *cos, const float *sin, float *y) {
  for (int64_t i = 0, half = size / 2; i < half; i += LANES) {
    vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, a * c - b * s);
    store(y + half + i, b * c + a * s);
  }
}

// One token's [queries | keys | values]: queries are rotated into `queries`, keys are rotated and go into the cache, as
// do values.
static void place(const Layer *layer, float *qkv, const float *cos, const float *sin, float *queries, uint16_t *slot) {
  int64_t size = layer->head_dim, heads = layer->heads, kv_heads = layer->kv_heads;
  float turned[size] __attribute__((aligned(64)));
  for (int64_t head = 0; head < heads; head++) {
    if (layer->query_norm) norm(qkv + head * size, 1, size, layer->query_norm, layer->eps, qkv + head * size);
    turn(qkv + head * size, size, cos, sin, queries + head * size);
  }
  float *keys = qkv + heads * size, *values = keys + kv_heads * size;
  for (int64_t head = 0; head < kv_heads; head++, slot += size) {
    if (layer->key_norm) norm(keys + head * size, 1, size, layer->key_norm, layer->eps, keys + head * size);
    turn(keys + head * size, size, cos, sin, turned);
    for (int64_t i = 0; i < size; i += LANES) store_bf16(slot + i, load(turned + i));
  }
  for (int64_t i = 0; i < kv_heads * size; i += LANES) store_bf16(slot + i, load(values + i));
}

// [gate | up] of each row -> silu(gate) * up.
static void activate(const float *gate_up, int64_t rows, int64_t inner, float *out) {
  for (int64_t row = 0; row < rows; row++, gate_up += 2 * inner, out += inner) {
    const float *up = gate_up + inner;
    int64_t i = 0;
    for (; i + LANES <= inner; i += LANES) {
      vf x = load(gate_up + i), e = exp_(either(x < 0.0f, x, -x));  // e^-|x|: neither side overflows
      store(out + i, x * either(x < 0.0f, e, splat(1.0f)) / (1.0f + e) * load(up + i));
    }
    for (; i < inner; i++) out[i] = gate_up[i] / (1.0f + expf(-gate_up[i])) * up[i];
  }
}

// ---- attention

#define MAX_GROUP 8    // query heads of one key head that are computed together
#define KEY_BLOCK 256  // positions that are widened at a time for a row of several tokens
#define PART_BYTES (256 << 10)  // of K/V that a row of one token goes through at a time

typedef struct {
  const Layer *layer;
  const Step *step;
  const uint16_t *cache;  // [blocks, block_size, 2, kv_heads, head_dim]
  const float *queries;   // [total_tokens, heads, head_dim], scaled
  float *out;             // the same
} Attention;

// A slot is where one position's K/V lies: the keys of all heads, then the values.
INLINE int64_t slot_size(const Layer *layer) { return 2 * layer->kv_heads * layer->head_dim; }

// The slots of positions [first, first + count) of a row.
static void slots_of(const Attention *at, int64_t row, int64_t first, int64_t count, const uint16_t **slots) {
  const int32_t *table = at->step->block_tables + row * at->step->table_width;
  int64_t block_size = at->step->block_size, size = slot_size(at->layer), offset = first % block_size;
  for (int64_t block = first / block_size, n = 0; n < count; block++, offset = 0) {
    const uint16_t *slot = at->cache + ((int64_t)table[block] * block_size + offset) * size;
    for (; offset < block_size && n < count; offset++, n++, slot += size) slots[n] = slot;
  }
}

// Slots to prefetch, one after the other and in the order of their addresses, so that the CPU's own prefetcher joins
// in.
typedef struct {
  const uint16_t *const *slots;
  int64_t count, size, index, offset;
} Incoming;

INLINE void fetch(Incoming *ahead, int64_t numbers) {
  for (int64_t i = 0; i < numbers && ahead->index < ahead->count; i += 64 / 2) {
    __builtin_prefetch(ahead->slots[ahead->index] + ahead->offset, 0, 2);
    ahead->offset += 64 / 2;
    if (ahead->offset >= ahead->size) ahead->offset = 0, ahead->index++;
  }
}

INLINE int64_t first_visible(const Layer *layer, int64_t position) {
  return layer->window && position >= layer->window ? position - layer->window + 1 : 0;
}

INLINE void pairs(const uint16_t *p, vf *even, vf *odd) {
  vpair words = *(const vpair *)p;
  *even = (vf)(words << 16);
  *odd = (vf)(words & 0xffff0000u);
}

// One token's `group` query heads against `count` slots of their key head, which is `at_head` numbers into a slot;
// softmax as it goes (arXiv 2205.14135). `queries` and `sums_of` [group, head_dim] have each PANEL as its even, then
// its odd numbers; `tops` and `totals` [group] are running maxima and sums; `scores` [group, room].
INLINE void decode_group(const int group, const Layer *layer, const uint16_t *const *slots, int64_t count,
                         int64_t at_head, const float *queries, float *scores, int64_t room, float *tops, float *totals,
                         float *sums_of, Incoming *ahead) {
  int64_t size = layer->head_dim, at_value = at_head + layer->kv_heads * size;
  for (int64_t n = 0; n < count; n += LANES) {
    vf products[MAX_GROUP][LANES];  // of LANES positions, still to be summed
    for (int64_t m = 0; m < LANES && n + m < count; m++) {
      const uint16_t *key = slots[n + m] + at_head;
      fetch(ahead, size);
      vf dots[MAX_GROUP];
#pragma GCC unroll 8
      for (int j = 0; j < group; j++) dots[j] = splat(0);
      for (int64_t i = 0; i < size; i += PANEL) {
        vf even, odd;
        pairs(key + i, &even, &odd);
#pragma GCC unroll 8
        for (int j = 0; j < group; j++) {
          dots[j] += load(queries + j * size + i) * even;
          dots[j] += load(queries + j * size + i + LANES) * odd;
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < group; j++) products[j][m] = dots[j];
    }
    for (int j = 0; j < group; j++) store(scores + j * room + n, sums(products[j]));  // past `count`: anything
  }
  float shrink[MAX_GROUP];
  for (int j = 0; j < group; j++) {
    float *s = scores + j * room;
    for (int64_t n = count; n < (count + LANES - 1) / LANES * LANES; n++) s[n] = -INFINITY;
    vf largest = splat(tops[j]), total = {0};
    for (int64_t n = 0; n < count; n += LANES) largest = larger(largest, load(s + n));
    float top = top_of(largest);
    for (int64_t n = 0; n < count; n += LANES) {
      vf weight = exp_(load(s + n) - top);
      store(s + n, weight);
      total += weight;
    }
    shrink[j] = tops[j] == -INFINITY ? 0 : expf(tops[j] - top);
    totals[j] = totals[j] * shrink[j] + sum(total);
    tops[j] = top;
  }
  for (int64_t i = 0; i < size; i += PANEL) {
    vf evens[MAX_GROUP], odds[MAX_GROUP];
#pragma GCC unroll 8
    for (int j = 0; j < group; j++) {
      evens[j] = load(sums_of + j * size + i) * shrink[j];
      odds[j] = load(sums_of + j * size + i + LANES) * shrink[j];
    }
    for (int64_t n = 0; n < count; n++) {
      vf even, odd;
      fetch(ahead, PANEL);
      pairs(slots[n] + at_value + i, &even, &odd);
#pragma GCC unroll 8
      for (int j = 0; j < group; j++) {
        vf weight = splat(scores[j * room + n]);
        evens[j] += weight * even;
        odds[j] += weight * odd;
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < group; j++)
      store(sums_of + j * size + i, evens[j]), store(sums_of + j * size + i + LANES, odds[j]);
  }
}

#define EACH_GROUP(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#define GROUP_CASE(G) \
  case G: \
    decode_group(G, layer, slots, count, kv_head * size, apart + line * size, scores, room, tops + line, totals + line, \
                 sums_of + line * size, ahead); \
    break;

// Key heads [first_head, end_head) against some slots. Lines are query heads, counted from that of the first key head
// on.
static void decode_part(const Layer *layer, const uint16_t *const *slots, int64_t count, int64_t first_head,
                        int64_t end_head, const float *apart, float *scores, int64_t room, float *tops, float *totals,
                        float *sums_of, Incoming *ahead) {
  int64_t size = layer->head_dim, group = layer->heads / layer->kv_heads;
  for (int64_t kv_head = first_head; kv_head < end_head; kv_head++)
    for (int64_t done = 0; done < group; done += MAX_GROUP) {
      int64_t line = (kv_head - first_head) * group + done;
      switch (group - done < MAX_GROUP ? group - done : MAX_GROUP) { EACH_GROUP(GROUP_CASE) }
    }
}

// Where number i of a panel lies once its even numbers come first, then its odd ones.
INLINE int64_t apart_place(int64_t i) { return i / PANEL * PANEL + i % 2 * LANES + i % PANEL / 2; }

// A row of one token, for key heads [first_head, end_head). Its K/V is read in parts that fit the core's own cache, and
// while one part is worked on the next is prefetched, as a step may read as much K/V as weights.
static int decode(const Attention *at, int64_t row, int64_t first_head, int64_t end_head) {
  const Layer *layer = at->layer;
  const Step *step = at->step;
  int64_t size = layer->head_dim, group = layer->heads / layer->kv_heads, lines = (end_head - first_head) * group;
  int64_t part = PART_BYTES / 2 / slot_size(layer) / LANES * LANES;
  if (part < LANES) part = LANES;
  float *memory = scratch(ATTENTION, 2 * lines * size + 2 * lines + MAX_GROUP * part);
  const uint16_t **slots = (const uint16_t **)scratch(SLOTS, 2 * part * (sizeof(void *) / sizeof(float)));
  if (memory == NULL || slots == NULL) return NO_MEMORY;
  float *apart = memory, *sums_of = apart + lines * size, *scores = sums_of + lines * size;
  float *tops = scores + MAX_GROUP * part, *totals = tops + lines;
  int64_t first_line = step->first_tokens[row] * layer->heads + first_head * group;
  const float *queries = at->queries + first_line * size;
  for (int64_t i = 0; i < lines * size; i++) apart[apart_place(i)] = queries[i], sums_of[i] = 0;
  for (int64_t line = 0; line < lines; line++) tops[line] = -INFINITY, totals[line] = 0;
  int64_t position = step->starts[row], first = first_visible(layer, position), end = position + 1;
  for (; first < end; first += part) {
    int64_t count = end - first < part ? end - first : part;
    slots_of(at, row, first, count, slots);
    // Then come this row's next slots, or the first ones of the next row.
    int64_t next_row = row, next_first = first + part, next_end = end;
    if (next_first >= end && row + 1 < step->num_rows && step->num_tokens[row + 1] == 1) {
      next_row = row + 1, next_first = first_visible(layer, step->starts[next_row]);
      next_end = step->starts[next_row] + 1;
    }
    Incoming ahead = {slots + part, next_end - next_first < part ? next_end - next_first : part, slot_size(layer), 0, 0};
    if (ahead.count > 0) slots_of(at, next_row, next_first, ahead.count, slots + part);
    if (end_head - first_head < layer->kv_heads) ahead.count = 0;  // other threads read the rest of the slots
    decode_part(layer, slots, count, first_head, end_head, apart, scores, part, tops, totals, sums_of, &ahead);
  }
  float *out = at->out + first_line * size;
  for (int64_t i = 0; i < lines * size; i++) out[i] = sums_of[apart_place(i)] / totals[i / size];
  return OK;
}

// Positions first + [from, count) of a row, widened: keys as panels [head_dim, PANEL positions], values as panels
// [KEY_BLOCK, PANEL numbers]. What lies outside becomes zero, as it may belong to others and not be a number.
static void widen(const Attention *at, int64_t row, int64_t kv_head, int64_t first, int64_t from, int64_t count,
                  float *keys, float *values) {
  int64_t size = at->layer->head_dim;
  const uint16_t *slots[KEY_BLOCK];
  if (from < 0) from = 0;
  if (from < count) slots_of(at, row, first + from, count - from, slots + from);
  for (int64_t n = 0; n < KEY_BLOCK; n++) {  // positions
    float *key_to = keys + n / PANEL * PANEL * size + n % PANEL;
    if (n < from || n >= count) {
      for (int64_t i = 0; i < size; i++) key_to[i * PANEL] = 0;
      for (int64_t i = 0; i < size; i += LANES)
        store(values + (i / PANEL * KEY_BLOCK + n) * PANEL + i % PANEL, splat(0));
      continue;
    }
    const uint16_t *key = slots[n] + kv_head * size;
    const uint16_t *value = key + at->layer->kv_heads * size;
    for (int64_t i = 0; i < size; i += LANES) {
      float wide[LANES];
      store(wide, load_bf16(key + i));
      for (int64_t j = 0; j < LANES; j++) key_to[(i + j) * PANEL] = wide[j];
      store(values + (i / PANEL * KEY_BLOCK + n) * PANEL + i % PANEL, load_bf16(value + i));
    }
  }
}

#define VALUE_CASE(R) \
  case R: \
    if (R <= MAX_TILE) tile(R <= MAX_TILE ? R : 1, 1, a, KEY_BLOCK, 1, panel, depth, (Ahead){0}, low, high); \
    break;

static void value_tile(int rows, const float *a, const float *panel, int64_t depth, vf *low, vf *high) {
  switch (rows) { EACH_TILE(VALUE_CASE) }
}

// Query lines [line, line + lines) of a row, a line being (token, head of the group), against one widened key block:
// softmax as it goes (arXiv 2205.14135). `tops` and `totals` are the lines' running maxima and sums.
static void attend_tile(const Attention *at, int64_t row, int64_t kv_head, int64_t line, int lines, int64_t first,
                        int64_t count, const float *keys, const float *values, float *tops, float *totals) {
  const Layer *layer = at->layer;
  int64_t size = layer->head_dim, group = layer->heads / layer->kv_heads, start = at->step->starts[row];
  float queries[size * MAX_TILE] __attribute__((aligned(64))), scores[MAX_TILE * KEY_BLOCK] __attribute__((aligned(64)));
  int64_t offsets[MAX_TILE];
  for (int i = 0; i < lines; i++) {
    int64_t token = at->step->first_tokens[row] + (line + i) / group, head = kv_head * group + (line + i) % group;
    offsets[i] = (token * layer->heads + head) * size;
    for (int64_t k = 0; k < size; k++) queries[k * lines + i] = at->queries[offsets[i] + k];
  }
  int64_t seen = start + (line + lines - 1) / group - first + 1;  // by the tile's last token
  if (seen > count) seen = count;
  if (seen <= 0) return;
  int64_t wide = (seen + PANEL - 1) / PANEL * PANEL;
  for (int64_t n = 0; n < wide; n += PANEL) {
    vf low[MAX_TILE] = {0}, high[MAX_TILE] = {0};
    wide_tile(lines, queries, keys + n * size, size, (Ahead){0}, low, high);
    for (int i = 0; i < lines; i++)
      store(scores + i * KEY_BLOCK + n, low[i]), store(scores + i * KEY_BLOCK + n + LANES, high[i]);
  }
  float shrink[MAX_TILE];
  for (int i = 0; i < lines; i++) {
    float *s = scores + i * KEY_BLOCK, top = tops[line + i], total = 0;
    int64_t position = start + (line + i) / group, from = first_visible(layer, position) - first;
    int64_t to = position - first + 1 < seen ? position - first + 1 : seen;
    for (int64_t n = 0; n < from && n < wide; n++) s[n] = -INFINITY;
    for (int64_t n = to < 0 ? 0 : to; n < wide; n++) s[n] = -INFINITY;
    vf largest = splat(top);
    for (int64_t n = 0; n < wide; n += LANES) largest = larger(largest, load(s + n));
    top = top_of(largest);
    float base = top == -INFINITY ? 0 : top;  // nothing seen yet: all weights are to be zero
    vf sums = {0};
    for (int64_t n = 0; n < wide; n += LANES) {
      vf weight = exp_(load(s + n) - base);
      store(s + n, weight);
      sums += weight;
    }
    total = sum(sums);
    shrink[i] = tops[line + i] == -INFINITY ? 0 : expf(tops[line + i] - base);
    totals[line + i] = totals[line + i] * shrink[i] + total;
    tops[line + i] = top;
  }
  for (int64_t k = 0; k < size; k += PANEL) {
    vf low[MAX_TILE], high[MAX_TILE];
    for (int i = 0; i < lines; i++) {
      low[i] = load(at->out + offsets[i] + k) * shrink[i];
      high[i] = load(at->out + offsets[i] + k + LANES) * shrink[i];
    }
    value_tile(lines, scores, values + k * KEY_BLOCK, wide, low, high);
    for (int i = 0; i < lines; i++)
      store(at->out + offsets[i] + k, low[i]), store(at->out + offsets[i] + k + LANES, high[i]);
  }
}

// A row of several tokens, for one key head.
static int prefill(const Attention *at, int64_t row, int64_t kv_head) {
  const Layer *layer = at->layer;
  const Step *step = at->step;
  int64_t size = layer->head_dim, group = layer->heads / layer->kv_heads;
  int64_t start = step->starts[row], num_tokens = step->num_tokens[row], end = start + num_tokens;
  int64_t lines = num_tokens * group, tiles = tiles_of(lines);
  float *memory = scratch(ATTENTION, 2 * KEY_BLOCK * size + 2 * lines);
  if (memory == NULL) return NO_MEMORY;
  float *keys = memory, *values = keys + KEY_BLOCK * size, *tops = values + KEY_BLOCK * size, *totals = tops + lines;
  for (int64_t line = 0; line < lines; line++) tops[line] = -INFINITY, totals[line] = 0;
  for (int64_t token = step->first_tokens[row]; token < step->first_tokens[row] + num_tokens; token++)
    memset(at->out + (token * layer->heads + kv_head * group) * size, 0, group * size * sizeof(float));
  for (int64_t first = first_visible(layer, start) / KEY_BLOCK * KEY_BLOCK; first < end; first += KEY_BLOCK) {
    int64_t count = end - first < KEY_BLOCK ? end - first : KEY_BLOCK;
    widen(at, row, kv_head, first, first_visible(layer, start) - first, count, keys, values);
    for (int64_t t = 0; t < tiles; t++) {
      int64_t line = tile_start(lines, tiles, t), next = tile_start(lines, tiles, t + 1);
      if (first_visible(layer, start + line / group) < first + count)
        attend_tile(at, row, kv_head, line, next - line, first, count, keys, values, tops, totals);
    }
  }
  for (int64_t line = 0; line < lines; line++) {
    int64_t token = step->first_tokens[row] + line / group, head = kv_head * group + line % group;
    float *out = at->out + (token * layer->heads + head) * size;
    for (int64_t i = 0; i < size; i += LANES) store(out + i, load(out + i) / totals[line]);
  }
  return OK;
}

static int attend(const Attention *at) {
  const Step *step = at->step;
  int64_t kv_heads = at->layer->kv_heads, splits = 1;  // of a row, among threads
  if (step->num_threads > 1) splits = (2 * step->num_threads + step->num_rows - 1) / step->num_rows;
  if (splits > kv_heads) splits = kv_heads;
  int64_t num_tasks = step->num_rows * splits;
  int status = OK;
#pragma omp parallel for num_threads(step->num_threads) if (step->num_threads > 1) schedule(dynamic) \
    reduction(max : status)
  for (int64_t task = 0; task < num_tasks; task++) {
    int64_t row = task / splits, split = task % splits;
    int64_t first_head = kv_heads * split / splits, end_head = kv_heads * (split + 1) / splits;
    int result = OK;
    if (step->num_tokens[row] == 1) {
      result = decode(at, row, first_head, end_head);
    } else {
      for (int64_t head = first_head; head < end_head && result == OK; head++) result = prefill(at, row, head);
    }
    if (result != OK) status = result;
  }
  return status;
}

// ---- a layer

#define CHUNK (20 * MAX_TILE)  // tokens that go through the products together, and stay in the core's cache

// hidden [total_tokens, hidden_size] is replaced by what the layer makes of it. The K/V of all rows is written before
// any row attends.
int layer(const Layer *layer, const Step *step, uint16_t *cache, float *hidden) {
  int64_t total = step->total_tokens, size = layer->head_dim, queries_size = layer->heads * size;
  int64_t qkv_size = queries_size + 2 * layer->kv_heads * size, threads = step->num_threads;
  int64_t chunk = total < CHUNK ? total : CHUNK;
  float *normed = scratch(NORMED, chunk * layer->hidden), *queries = scratch(QUERIES, total * queries_size);
  float *attended = scratch(ATTENDED, total * queries_size), *active = scratch(ACTIVE, chunk * layer->inner);
  float *projected = scratch(PROJECTED, chunk * (qkv_size > 2 * layer->inner ? qkv_size : 2 * layer->inner));
  if (!normed || !queries || !attended || !active || !projected) return NO_MEMORY;
  for (int64_t first = 0; first < total; first += CHUNK) {
    int64_t n = total - first < CHUNK ? total - first : CHUNK;
    norm(hidden + first * layer->hidden, n, layer->hidden, layer->input_norm, layer->eps, normed);
    if (linear(normed, n, layer->qkv, qkv_size, layer->hidden, layer->qkv_bias, projected, 0, layer->output,
               threads))
      return NO_MEMORY;
    for (int64_t i = 0; i < n; i++) {
      int64_t token = first + i;
      place(layer, projected + i * qkv_size, step->cos + token * size / 2, step->sin + token * size / 2,
            queries + token * queries_size, cache + step->cache_slots[token] * 2 * layer->kv_heads * size);
    }
  }
  float scale = 1.0f / sqrtf(size);
  for (int64_t i = 0; i < total * queries_size; i += LANES) store(queries + i, load(queries + i) * scale);
  if (attend(&(Attention){layer, step, cache, queries, attended})) return NO_MEMORY;
  for (int64_t first = 0; first < total; first += CHUNK) {
    int64_t n = total - first < CHUNK ? total - first : CHUNK;
    float *rows = hidden + first * layer->hidden;
    if (linear(attended + first * queries_size, n, layer->output, layer->hidden, queries_size, layer->output_bias, rows,
               1, layer->gate_up, threads))
      return NO_MEMORY;
    norm(rows, n, layer->hidden, layer->mlp_norm, layer->eps, normed);
    if (linear(normed, n, layer->gate_up, 2 * layer->inner, layer->hidden, layer->gate_up_bias, projected, 0,
               layer->down, threads))
      return NO_MEMORY;
    activate(projected, n, layer->inner, active);
    if (linear(active, n, layer->down, layer->hidden, layer->inner, layer->down_bias, rows, 1, layer->after, threads))
      return NO_MEMORY;
  }
  return OK;
}
