/* Passes in float32 that need vectors of channels: depthwise convolution, and the product with one number per channel.
 *
 * Compiled with kernels.c, in whose layout they work; their twins in PyTorch are in vectors.py. */
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define TILE 8       /* outputs in a row that are summed in registers at once */
#define PERIOD 16384 /* floats after which the pattern of channels in vectors repeats: as in vectors.py */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
enum { NONE, RELU, SWISH, RELU6, HARDSWISH };

/* A compiler that reads the same vector from memory once per use makes reading the bottleneck. */
#ifdef __AVX512F__
#define KEEP(VECTOR) __asm__("" : "+v"(VECTOR))
#else
#define KEEP(VECTOR)
#endif

static inline vec load(const float *from) { return *(const vec *)from; }
static inline vec pick(ivec which, vec yes, vec no) { return (vec)((which & (ivec)yes) | (~which & (ivec)no)); }

/* e^x by 2^n e^r with |r| <= ln 2 / 2; x between -87 and 88. */
static inline vec exponential(vec x) {
    const vec magic = (vec){} + 12582912.f, shifted = x * 1.44269504f + magic, n = shifted - magic;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.f) * (vec)(((ivec)shifted - (ivec)magic + 127) << 23);
}

static inline vec inverse(vec x) {
#ifdef __AVX512F__
    const vec about = (vec)_mm512_rcp14_ps((__m512)x); /* one step of Newton's from 14 bits: dividing takes twice as long */
    return about * (2.f - x * about);
#else
    return 1.f / x;
#endif
}

static inline vec up_to_six(vec x) {
    const vec zero = {}, six = zero + 6.f;
    x = pick(x < zero, zero, x);
    return pick(x > six, six, x);
}

static inline vec act(vec x, int activation) {
    const vec zero = {};
    if (activation == RELU) return pick(x < zero, zero, x);
    if (activation == NONE) return x;
    if (activation == RELU6) return up_to_six(x);
    if (activation == HARDSWISH) return x * up_to_six(x + 3.f) * (1.f / 6.f);
    vec y = -x;
    x = pick(y > 88.f, zero, x); /* too small for a float */
    y = pick(y > 88.f, zero, y);
    y = pick(y < -87.f, zero - 87.f, y);
    return x * inverse(1.f + exponential(y));
}

/* TILE outputs next to each other from one block of channels. taps holds the first and last tap in T and H that are not
 * in the padding; of the inputs in a row, those from `begin` to `end` exist. width (3, else any) and stride are known
 * where this is inlined, and the sums stay in registers. */
#define INPUTS(STRIDE) ((TILE - 1) * (STRIDE) + 3)
static inline __attribute__((always_inline)) void tile(const float *x, const int64_t *in, const float *weight,
                                                       const int64_t *kernel, const int64_t *taps, int64_t channels,
                                                       int64_t begin, int64_t end, const int inside, const int stride,
                                                       vec *out) {
    vec sum[TILE];
    const vec zero = {};
#pragma GCC unroll 8
    for (int o = 0; o < TILE; o++) sum[o] = out[o];
    for (int64_t t = taps[0]; t < taps[1]; t++)
        for (int64_t h = taps[2]; h < taps[3]; h++) {
            const float *from = x + (t * in[1] + h) * in[2] * channels;
            const float *w = weight + (t * kernel[1] + h) * 3 * channels;
            const vec w0 = load(w), w1 = load(w + channels), w2 = load(w + 2 * channels);
#pragma GCC unroll 32
            for (int i = 0; i < INPUTS(stride); i++) {
                vec v = inside || (i >= begin && i < end) ? load(from + i * channels) : zero;
                KEEP(v);
                if (i % stride == 0 && i / stride < TILE) sum[i / stride] += w0 * v;
                if (i >= 1 && (i - 1) % stride == 0 && (i - 1) / stride < TILE) sum[(i - 1) / stride] += w1 * v;
                if (i >= 2 && (i - 2) % stride == 0) sum[(i - 2) / stride] += w2 * v;
            }
        }
#pragma GCC unroll 8
    for (int o = 0; o < TILE; o++) out[o] = sum[o];
}

static void any_tile(const float *x, const int64_t *in, const float *weight, const int64_t *kernel, const int64_t *taps,
                     int64_t channels, int64_t begin, int64_t end, int64_t stride, vec *out) {
    for (int64_t t = taps[0]; t < taps[1]; t++)
        for (int64_t h = taps[2]; h < taps[3]; h++)
            for (int64_t k = 0; k < kernel[2]; k++) {
                const vec tap = load(weight + ((t * kernel[1] + h) * kernel[2] + k) * channels);
                const float *from = x + ((t * in[1] + h) * in[2] + k) * channels;
                for (int64_t o = 0; o < TILE; o++)
                    if (o * stride + k >= begin && o * stride + k < end)
                        out[o] += tap * load(from + o * stride * channels);
            }
}

static inline void clip(int64_t start, int64_t size, int64_t kernel, int64_t *taps) {
    taps[0] = start < 0 ? -start : 0;
    taps[1] = start + kernel > size ? size - start : kernel;
}

/* out = act(conv(x) + bias), one filter per channel. sizes are (clips, T, H, W, T_o, H_o, W_o); window is kernel, stride
 * and padding of T, H and W; weight (taps, channels). At least LANES channels: the last vector overlaps the one before.
 * pooled[frame][c], where given, takes the mean over the positions; sums has room for one number per row and channel. */
void depthwise_f32(const float *x, const int64_t *sizes, const int64_t *window, const float *weight, const float *bias,
                   int activation, int64_t channels, float *out, float *sums, float *pooled) {
    const int64_t *in = sizes + 1, *to = sizes + 4, *kernel = window, *stride = window + 3, *padding = window + 6;
    const int64_t blocks = (channels + LANES - 1) / LANES, parts = to[1] < 32 && blocks >= 4 ? 4 : 1;
    const int64_t step = kernel[2] == 3 ? stride[2] : 0;
#pragma omp parallel for schedule(static)
    for (int64_t job = 0; job < sizes[0] * to[1] * parts; job++) {
        const int64_t sample = job / parts / to[1], h = job / parts % to[1], h0 = h * stride[1] - padding[1];
        const int64_t first = blocks * (job % parts) / parts, last = blocks * (job % parts + 1) / parts;
        int64_t taps[4];
        clip(h0, in[1], kernel[1], taps + 2);
        for (int64_t t = 0; t < to[0]; t++) { /* frames inside: the rows that they share are still in the cache */
            const int64_t t0 = t * stride[0] - padding[0], row = (sample * to[0] + t) * to[1] + h;
            clip(t0, in[0], kernel[0], taps);
            for (int64_t w = 0; w < to[2]; w += TILE) { /* and channels: what a tile reads stays in the first cache */
                const int64_t w0 = w * stride[2] - padding[2], begin = -w0, end = in[2] - w0;
                const int inside = begin <= 0 && end >= INPUTS(step);
                for (int64_t block = first; block < last; block++) {
                    const int64_t c = block + 1 < blocks ? block * LANES : channels - LANES;
                    const float *from = x + c + (((sample * in[0] + t0) * in[1] + h0) * in[2] + w0) * channels;
                    float *line = out + (row * to[2] + w) * channels + c;
                    vec sum[TILE], all = {};
                    for (int o = 0; o < TILE; o++) sum[o] = load(bias + c);
#define TAPS from, in, weight + c, kernel, taps, channels, begin, end
                    if (step == 1 && inside)
                        tile(TAPS, 1, 1, sum);
                    else if (step == 1)
                        tile(TAPS, 0, 1, sum);
                    else if (step == 2 && inside)
                        tile(TAPS, 1, 2, sum);
                    else if (step == 2)
                        tile(TAPS, 0, 2, sum);
                    else
                        any_tile(TAPS, stride[2], sum);
                    for (int64_t o = 0; o < TILE && w + o < to[2]; o++) {
                        const vec y = act(sum[o], activation);
                        *(vec *)(line + o * channels) = y;
                        all += y;
                    }
                    float *total = sums + row * channels + c;
                    if (sums && w == 0)
                        for (int64_t i = block * LANES - c; i < LANES; i++) total[i] = 0; /* the others are taken */
                    if (sums && c == block * LANES)
                        *(vec *)total += all;
                    else if (sums)
                        for (int64_t i = block * LANES - c; i < LANES; i++) total[i] += all[i];
                }
            }
        }
    }
    const float share = 1.f / (to[1] * to[2]);
    for (int64_t row = 0; sums && row < sizes[0] * to[0] * to[1]; row++)
        for (int64_t c = 0; c < channels; c++) pooled[row / to[1] * channels + c] += share * sums[row * channels + c];
}

/* out = act(x * scale[clip]) for frames of `positions` rows, also in place. Rows are taken as many at a time as fill
 * whole vectors; pooled as above. */
void rescale_f32(const float *x, const float *scale, int activation, int64_t clips, int64_t frames, int64_t positions,
                 int64_t channels, float *out, float *pooled) {
    int64_t rows = LANES;
    while (rows > 1 && channels * (rows / 2) % LANES == 0) rows /= 2;
    const int64_t width = rows * channels, parts = clips * frames < 8 ? 8 : 1;
#pragma omp parallel for schedule(static)
    for (int64_t job = 0; job < clips * frames * parts; job++) {
        const int64_t frame = job / parts, first = positions * (job % parts) / parts;
        const int64_t last = positions * (job % parts + 1) / parts;
        float by[PERIOD], sum[PERIOD], rest[PERIOD];
        for (int64_t i = 0; i < width; i++) by[i] = scale[frame / frames * channels + i % channels];
        if (pooled) memset(sum, 0, sizeof(float) * width);
        for (int64_t row = first; row < last; row += rows) {
            const int64_t at = (frame * positions + row) * channels, some = (last - row) * channels;
            const float *from = x + at;
            float *to = out + at;
            if (some < width) {
                memset(rest, 0, sizeof(float) * width);
                from = to = memcpy(rest, from, sizeof(float) * some);
            }
            for (int64_t i = 0; i < width; i += LANES) {
                const vec y = act(load(from + i) * load(by + i), activation);
                *(vec *)(to + i) = y;
                if (pooled) *(vec *)(sum + i) += y;
            }
            if (some < width) memcpy(out + at, rest, sizeof(float) * some);
        }
        if (pooled)
#pragma omp critical
            for (int64_t i = 0; i < width; i++) pooled[frame * channels + i % channels] += sum[i] / positions;
    }
}
