/* The passes over memory that surround a reduced convolution, each of them once, in channels-last layout.
 *
 * Compiled on first use by kernels.py; each function has a twin in PyTorch there, and a test holds both together.
 * They exist per type: float, and bfloat16 as the upper half of a float. */
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline uint16_t narrow(float value) { /* to the nearest, ties to even, as PyTorch rounds */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#define LOAD_f32(x) (x)
#define STORE_f32(x) (x)
#define LOAD_bf16(x) widen(x)
#define STORE_bf16(x) narrow(x)

/* One row holds the channels of one position, no more than LIMIT of them: kernels.py sees to that. */
#define LIMIT 4096
#define HIDDEN 256

/* Ask for what comes 4 KB later: the processor's own prefetching is a quarter slower over one long read. */
#define AHEAD(FROM, COUNT)                                                                                         \
    for (uintptr_t at = (uintptr_t)(FROM), stop = (uintptr_t)((FROM) + (COUNT)); at < stop; at += 64)              \
        __builtin_prefetch((const void *)(at + 4096));

/* z[r][j] = sum over i of y[r][i] w[i][j] for ROWS rows at once, as many sums as fit into registers. w stands in blocks of
 * WIDTH columns, `columns` is a multiple of WIDTH. */
typedef float vec __attribute__((vector_size(64)));
#ifdef __AVX512F__
#define ROWS 8
#else
#define ROWS 3
#endif
#define WIDTH 32
#define TILE 1024 /* columns at most, and rows of w: kernels.py sees to that */
static void product(const float *const y[ROWS], int64_t k, const float *w, int64_t columns, float *z) {
    for (int64_t block = 0; block < columns; block += WIDTH) {
        vec sum[ROWS][2] = {{{0}}};
        for (int64_t i = 0; i < k; i++, w += WIDTH) {
            vec left, right;
            memcpy(&left, w, 64);
            memcpy(&right, w + 16, 64);
            for (int r = 0; r < ROWS; r++) {
                sum[r][0] += y[r][i] * left;
                sum[r][1] += y[r][i] * right;
            }
        }
        for (int r = 0; r < ROWS; r++) memcpy(z + r * columns + block, sum[r], 128);
    }
}

/* The same for rows of any type, `count` of them: the last stands for those that are missing. */
#define PRODUCT(T)                                                                                                 \
    static void product_##T(const TYPE_##T *y, int64_t count, int64_t k, const float *w, int64_t columns,          \
                            TYPE_##T *tile) {                                                                      \
        float wide[NARROW_##T ? ROWS * TILE : 1], z[NARROW_##T ? ROWS * TILE : 1];                                 \
        const float *rows[ROWS];                                                                                   \
        if (NARROW_##T)                                                                                            \
            for (int64_t i = 0; i < count * k; i++) wide[i] = LOAD_##T(y[i]);                                      \
        for (int64_t r = 0; r < ROWS; r++)                                                                         \
            rows[r] = (NARROW_##T ? wide : (const float *)y) + (r < count ? r : count - 1) * k;                    \
        product(rows, k, w, columns, NARROW_##T ? z : (float *)tile);                                              \
        if (NARROW_##T)                                                                                            \
            for (int64_t i = 0; i < count * columns; i++) tile[i] = STORE_##T(z[i]);                               \
    }

#define TYPE_f32 float
#define TYPE_bf16 uint16_t
#define NARROW_f32 0
#define NARROW_bf16 1
PRODUCT(f32)
PRODUCT(bf16)

/* to[c] = act(value(c) + residual[c]) for the channels from begin to end. The residual may lie where the result goes: a
 * compiler that is not told that each c stands alone would then take them one by one. */
#define FINISH(T, VALUE)                                                                                           \
    if (residual)                                                                                                  \
        _Pragma("omp simd") for (int64_t c = begin; c < end; c++) {                                                \
            float value = (VALUE) + LOAD_##T(residual[row * channels + c]);                                        \
            to[c] = STORE_##T(relu && value < 0 ? 0 : value);                                                      \
        }                                                                                                          \
    else                                                                                                           \
        _Pragma("omp simd") for (int64_t c = begin; c < end; c++) {                                                \
            float value = (VALUE);                                                                                 \
            to[c] = STORE_##T(relu && value < 0 ? 0 : value);                                                      \
        }

/* assemble: out[row][c] = act(scale[c] * in[source[c]] + shift[c] + residual[row][c]), where in holds the k computed
 * channels of the row and then the d rebuilt ones: z, or y w, computed here where w is given. Rows of out lie
 * `apart`, with room for others' channels in between. pieces are (begin, end, from): channels that stand in a run of one
 * input from `from` on, or, where from is negative, are gathered one by one.
 *
 * fill: from every stride-th frame y to all of them. Frame s * stride + d of a clip is
 * act(weight[d][0] * y_s + weight[d][1] * y_(s+1) + bias[d] + residual), and the last y stands for its follower.
 *
 * Both add the mean over the positions of each frame to pooled[frame][c], where that is given: the next gate reads it,
 * and here the numbers are at hand.
 *
 * max_pool: sizes are (clips, T, H, W, T_o, H_o, W_o); window is kernel, stride and the padding before, of T, H and W;
 * what lies outside is `outside`. Of neighbours' windows that overlap, each column is reduced once: as many are kept as a
 * window is wide, RING at most: kernels.py sees to that.
 *
 * gate: z = w2 tanh(w1 mean(x) + b1) + b2 of each sample, the mean taken over the rows of each frame. Four quarters of the
 * rows are read at once: the processor fetches four streams ahead, a fifth faster than one. */

/* Every frame in parts, so that each thread has work even where there is one frame. */
#define FOR_EACH_PART(FRAMES, POSITIONS)                                                                           \
    const int64_t parts = (FRAMES) < 8 ? 8 : 1;                                                                    \
    _Pragma("omp parallel for schedule(static)") for (int64_t job = 0; job < (FRAMES) * parts; job++) {            \
        const int64_t frame = job / parts, part = job % parts;                                                     \
        const int64_t first = (POSITIONS) * part / parts, last = (POSITIONS) * (part + 1) / parts;                 \
        if (first == last) continue;

/* The row before: reading back what was stored just now would wait for the stores. */
#define ADD_TO_SUM(T, FROM)                                                                                        \
    if (pooled)                                                                                                    \
        for (int64_t c = 0; c < channels; c++) sum[c] += LOAD_##T((FROM)[c]);

#define ADD_TO_POOLED                                                                                              \
    if (pooled)                                                                                                    \
        _Pragma("omp critical") for (int64_t c = 0; c < channels; c++) pooled[frame * channels + c] +=             \
            sum[c] / positions;

/* The larger of both; what is no number stays. */
static inline float larger(float value, float best) { return value > best || value != value ? value : best; }

typedef int32_t bits __attribute__((vector_size(64)));
static inline vec larger_vec(vec value, vec best) {
    const bits take = (value > best) | (value != value);
    return (vec)((take & (bits)value) | (~take & (bits)best));
}

static inline vec load_f32(const float *from) {
    vec value;
    memcpy(&value, from, 64);
    return value;
}

static inline vec load_bf16(const uint16_t *from) {
    vec value;
    for (int i = 0; i < 16; i++) value[i] = widen(from[i]);
    return value;
}

/* out[c] = the largest of start and from[t * step_t + h * step_h + c]: BLOCK channels at a time stay in registers. */
#define BLOCK 64
#define REDUCE(T)                                                                                                  \
    static void reduce_##T(const TYPE_##T *from, int64_t count_t, int64_t step_t, int64_t count_h, int64_t step_h, \
                           int64_t channels, float start, float *out) {                                            \
        int64_t c = 0;                                                                                             \
        for (; c + BLOCK <= channels; c += BLOCK) {                                                                \
            vec best[BLOCK / 16];                                                                                  \
            for (int q = 0; q < BLOCK / 16; q++) best[q] = (vec){0} + start;                                       \
            for (int64_t t = 0; t < count_t; t++)                                                                  \
                for (int64_t h = 0; h < count_h; h++)                                                              \
                    for (int q = 0; q < BLOCK / 16; q++)                                                           \
                        best[q] = larger_vec(load_##T(from + t * step_t + h * step_h + c + 16 * q), best[q]);      \
            memcpy(out + c, best, sizeof best);                                                                    \
        }                                                                                                          \
        for (; c < channels; c++) {                                                                                \
            out[c] = start;                                                                                        \
            for (int64_t t = 0; t < count_t; t++)                                                                  \
                for (int64_t h = 0; h < count_h; h++)                                                              \
                    out[c] = larger(LOAD_##T(from[t * step_t + h * step_h + c]), out[c]);                          \
        }                                                                                                          \
    }

REDUCE(f32)
REDUCE(bf16)

#define FEW 32768 /* numbers that one thread has read before others are awake */

/* to[h] += sum over c of x[c] w[c][h], four at once: each sum waits for itself */
static void times(const float *x, const float *w, int64_t channels, int64_t hidden, float *to) {
    float part[4][HIDDEN] = {{0}};
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4)
        for (int q = 0; q < 4; q++)
            for (int64_t h = 0; h < hidden; h++) part[q][h] += x[c + q] * w[(c + q) * hidden + h];
    for (; c < channels; c++)
        for (int64_t h = 0; h < hidden; h++) part[0][h] += x[c] * w[c * hidden + h];
    for (int64_t h = 0; h < hidden; h++) to[h] += (part[0][h] + part[1][h]) + (part[2][h] + part[3][h]);
}

#define DEFINE(T, E)                                                                                               \
    void assemble_##T(const E *y, int64_t k, const E *z, int64_t d, const float *w, const int32_t *pieces,         \
                      int64_t num_pieces, const int32_t *source, const float *scale, const float *shift,           \
                      const E *residual, int relu, int64_t frames, int64_t positions, int64_t channels, E *out,    \
                      int64_t apart, float *pooled) {                                                              \
        int gathers = 0;                                                                                           \
        for (int64_t p = 0; p < num_pieces; p++) gathers |= pieces[3 * p + 2] < 0;                                 \
        FOR_EACH_PART(frames, positions)                                                                           \
        float in[LIMIT], sum[LIMIT];                                                                               \
        E tile[ROWS * TILE];                                                                                       \
        memset(sum, 0, sizeof(float) * channels);                                                                  \
        const int64_t begin_row = frame * positions + first, end_row = frame * positions + last;                   \
        for (int64_t row = begin_row; row < end_row; row++) {                                                      \
            E *to = out + row * apart;                                                                             \
            const int64_t within = (row - begin_row) % ROWS;                                                       \
            const E *rebuilt = w ? tile + within * d : z + row * d;                                                \
            if (w && within == 0)                                                                                  \
                product_##T(y + row * k, end_row - row < ROWS ? end_row - row : ROWS, k, w, d, tile);              \
            AHEAD(y + row * k, k)                                                                                  \
            if (residual) AHEAD(residual + row * channels, channels)                                               \
            if (gathers) {                                                                                         \
                for (int64_t c = 0; c < k; c++) in[c] = LOAD_##T(y[row * k + c]);                                  \
                for (int64_t c = 0; c < d; c++) in[k + c] = LOAD_##T(rebuilt[c]);                                  \
            }                                                                                                      \
            for (int64_t p = 0; p < num_pieces; p++) {                                                             \
                int64_t begin = pieces[3 * p], end = pieces[3 * p + 1], from = pieces[3 * p + 2];                  \
                if (from < 0) {                                                                                    \
                    FINISH(T, scale[c] * in[source[c]] + shift[c])                                                 \
                } else {                                                                                           \
                    const E *run = from < k ? y + row * k + from : rebuilt + from - k;                             \
                    FINISH(T, scale[c] * LOAD_##T(run[c - begin]) + shift[c])                                      \
                }                                                                                                  \
            }                                                                                                      \
            if (row > begin_row) ADD_TO_SUM(T, to - apart)                                                         \
        }                                                                                                          \
        if (last > first) ADD_TO_SUM(T, out + (end_row - 1) * apart)                                               \
        ADD_TO_POOLED                                                                                              \
        }                                                                                                          \
    }                                                                                                              \
    void fill_##T(const E *y, int64_t clips, int64_t held, int64_t stride, int64_t frames, const float *weight,    \
                  const float *bias, const E *residual, int relu, int64_t positions, int64_t channels, E *out,     \
                  float *pooled) {                                                                                 \
        const int64_t begin = 0, end = channels;                                                                   \
        FOR_EACH_PART(clips * frames, positions)                                                                   \
        const int64_t clip = frame / frames, from = frame % frames / stride, d = frame % frames % stride;          \
        const int64_t next = from + 1 < held ? from + 1 : from;                                                    \
        const float *w = weight + d * 2 * channels, *b = bias + d * channels;                                      \
        float sum[LIMIT];                                                                                          \
        memset(sum, 0, sizeof(float) * channels);                                                                  \
        for (int64_t position = first; position < last; position++) {                                              \
            const int64_t row = frame * positions + position;                                                      \
            const E *left = y + ((clip * held + from) * positions + position) * channels;                          \
            const E *right = y + ((clip * held + next) * positions + position) * channels;                         \
            E *to = out + row * channels;                                                                          \
            FINISH(T, w[c] * LOAD_##T(left[c]) + w[channels + c] * LOAD_##T(right[c]) + b[c])                      \
            if (position > first) ADD_TO_SUM(T, to - channels)                                                     \
        }                                                                                                          \
        if (last > first) ADD_TO_SUM(T, out + (frame * positions + last - 1) * channels)                           \
        ADD_TO_POOLED                                                                                              \
        }                                                                                                          \
    }                                                                                                              \
    void max_pool_##T(const E *x, const int64_t *sizes, const int64_t *window, float outside, int64_t channels,    \
                      E *out) {                                                                                    \
        const int64_t *in = sizes + 1, *to = sizes + 4, *kernel = window, *stride = window + 3, *before = window + 6;\
        _Pragma("omp parallel for schedule(static)") for (int64_t row = 0; row < sizes[0] * to[0] * to[1]; row++) {\
            int64_t place = row, begin[2], end[2];                                                                 \
            float start = -__builtin_inff();                                                                       \
            for (int axis = 1; axis >= 0; axis--) {                                                                \
                int64_t first = place % to[axis] * stride[axis] - before[axis], last = first + kernel[axis];       \
                place /= to[axis];                                                                                 \
                if (first < 0 || last > in[axis]) start = outside;                                                 \
                begin[axis] = first < 0 ? 0 : first;                                                               \
                end[axis] = last > in[axis] ? in[axis] : last;                                                     \
            }                                                                                                      \
            const E *rows = x + ((place * in[0] + begin[0]) * in[1] + begin[1]) * in[2] * channels;                \
            float columns[kernel[2] * channels], best[channels];                                                   \
            int64_t ready = 0;                                                                                     \
            for (int64_t w = 0; w < to[2]; w++) {                                                                  \
                const int64_t first = w * stride[2] - before[2], last = first + kernel[2];                         \
                const int64_t left = first < 0 ? 0 : first, right = last > in[2] ? in[2] : last;                   \
                for (ready = ready < left ? left : ready; ready < right; ready++)                                  \
                    reduce_##T(rows + ready * channels, end[0] - begin[0], in[1] * in[2] * channels,               \
                               end[1] - begin[1], in[2] * channels, channels, start,                               \
                               columns + ready % kernel[2] * channels);                                            \
                /* The columns of a window lie in a ring: from left to its end, and from its beginning. */         \
                const int64_t from = left % kernel[2], count = right > left ? right - left : 0;                    \
                const int64_t behind = count < kernel[2] - from ? count : kernel[2] - from;                        \
                reduce_f32(columns + from * channels, behind, channels, 1, 0, channels,                            \
                           first < 0 || last > in[2] ? outside : start, best);                                     \
                if (count > behind) {                                                                              \
                    float others[channels];                                                                        \
                    reduce_f32(columns, count - behind, channels, 1, 0, channels, start, others);                  \
                    for (int64_t c = 0; c < channels; c++) best[c] = larger(others[c], best[c]);                   \
                }                                                                                                  \
                E *to_row = out + (row * to[2] + w) * channels;                                                    \
                for (int64_t c = 0; c < channels; c++) to_row[c] = STORE_##T(best[c]);                             \
            }                                                                                                      \
        }                                                                                                          \
    }                                                                                                              \
    static void one_gate_##T(const E *x, int64_t frames, int64_t rows, int64_t channels, const float *w1,          \
                             const float *b1, int64_t hidden, const float *w2, const float *b2, int64_t outs,      \
                             float *z) {                                                                           \
        float total[HIDDEN] = {0}, whole[LIMIT];                                                                   \
        const int apart = frames >= 8; /* then each frame multiplies its own mean; of fewer, one thread all of them */\
        for (int64_t frame = 0; frame < (apart ? 1 : frames); frame++) {                                           \
            if (!apart) memset(whole, 0, sizeof(float) * channels);                                                \
            const int64_t jobs = apart ? frames : 8, few = rows * channels < FEW;                                  \
            _Pragma("omp parallel for schedule(static) if (apart || !few)") for (int64_t job = 0; job < jobs; job++) {\
                const int64_t first = apart ? 0 : rows * job / 8, last = apart ? rows : rows * (job + 1) / 8;      \
                float sum[LIMIT], mine[HIDDEN] = {0};                                                              \
                memset(sum, 0, sizeof(float) * channels);                                                          \
                const int64_t quarter = (last - first) / 4 * channels;                                             \
                const E *from = x + ((apart ? job : frame) * rows + first) * channels, *end = from + quarter;      \
                for (; from < end; from += channels)                                                               \
                    for (int64_t c = 0; c < channels; c++)                                                         \
                        sum[c] += (LOAD_##T(from[c]) + LOAD_##T(from[quarter + c])) +                              \
                                  (LOAD_##T(from[2 * quarter + c]) + LOAD_##T(from[3 * quarter + c]));             \
                from += 3 * quarter;                                                                               \
                for (int64_t r = (last - first) / 4 * 4; r < last - first; r++, from += channels)                  \
                    for (int64_t c = 0; c < channels; c++) sum[c] += LOAD_##T(from[c]);                            \
                if (apart) times(sum, w1 + job * channels * hidden, channels, hidden, mine);                       \
                _Pragma("omp critical") {                                                                          \
                    if (apart)                                                                                     \
                        for (int64_t h = 0; h < hidden; h++) total[h] += mine[h] / rows;                           \
                    else                                                                                           \
                        for (int64_t c = 0; c < channels; c++) whole[c] += sum[c] / rows;                          \
                }                                                                                                  \
            }                                                                                                      \
            if (!apart) times(whole, w1 + frame * channels * hidden, channels, hidden, total);                     \
        }                                                                                                          \
        for (int64_t o = 0; o < outs; o++) z[o] = b2[o];                                                           \
        for (int64_t h = 0; h < hidden; h++) {                                                                     \
            float value = tanhf(total[h] + b1[h]);                                                                 \
            for (int64_t o = 0; o < outs; o++) z[o] += value * w2[h * outs + o];                                   \
        }                                                                                                          \
    }                                                                                                              \
    void gate_##T(const E *x, int64_t samples, int64_t frames, int64_t rows, int64_t channels, const float *w1,    \
                  const float *b1, int64_t hidden, const float *w2, const float *b2, int64_t outs, float *z) {     \
        if (samples == 1) { /* not in a region of its own: within one, new threads would be made each time */      \
            one_gate_##T(x, frames, rows, channels, w1, b1, hidden, w2, b2, outs, z);                              \
            return;                                                                                                \
        }                                                                                                          \
        _Pragma("omp parallel for schedule(static)") for (int64_t n = 0; n < samples; n++)                         \
            one_gate_##T(x + n * frames * rows * channels, frames, rows, channels, w1, b1, hidden, w2, b2, outs,   \
                         z + n * outs);                                                                            \
    }

DEFINE(f32, float)
DEFINE(bf16, uint16_t)
