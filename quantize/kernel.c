/* Q4_K, Q5_K and Q6_K as ggml makes them without an importance matrix, eight or sixteen blocks at a time.

   The arithmetic is ggml's (quantize_row_q4_K_ref, _q5_K_ref, _q6_K_ref), operation by operation and in its order; only
   that a vector's lanes are the sub-blocks of one super-block. So the bytes are the same where the compiler fuses no
   multiplication with an addition, and gguf_kernel.py believes that only after comparing. A super-block with something
   out of the ordinary (all equal, a scale of 0) goes to ggml itself, through `fallback`.
*/
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef size_t (*chunk)(int type, const float *x, void *out, int64_t start, int64_t rows, int64_t cols, const float *w);

#define ALL8(c) ((f8){c, c, c, c, c, c, c, c})
#define ALL16(c) ((f16){c, c, c, c, c, c, c, c, c, c, c, c, c, c, c, c})
#define PICK(F, I, mask, a, b) ((F)(((I)(a) & (mask)) | ((I)(b) & ~(mask))))
#define ROUND(I, v) (((I)((v) + 12582912.f) & 0x007fffff) - 0x00400000)
#define CLAMP(I, l, low, high) PICK(I, I, (l) < (low), (I){} + (low), PICK(I, I, (l) > (high), (I){} + (high), l))
#define FLOAT(F, l) __builtin_convertvector(l, F)

static uint16_t half_of(float x) {
    _Float16 h = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}

static float of_half(uint16_t bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return (float)h;
}

static int nearest(float x) {
    float v = x + 12582912.f;
    int32_t bits;
    memcpy(&bits, &v, 4);
    return (bits & 0x007fffff) - 0x00400000;
}

/* Scale and (negated) minimum of eight sub-blocks of 32, by trying `steps` + 1 scales; 0 = not an ordinary one. */
static int scale_and_min(const f8 *x, int top, float from, int steps, f8 *scales, f8 *mins) {
    f8 squares = ALL8(0), weights[32], tried[32];
    for (int i = 0; i < 32; ++i) squares += x[i] * x[i];
    f8 mean;
    for (int lane = 0; lane < 8; ++lane) mean[lane] = sqrtf(squares[lane] / 32);
    f8 low = x[0], high = x[0];
    for (int i = 0; i < 32; ++i) {
        weights[i] = mean + (f8)((i8)x[i] & 0x7fffffff);
        low = PICK(f8, i8, x[i] < low, x[i], low);
        high = PICK(f8, i8, x[i] > high, x[i], high);
    }
    f8 sum_w = weights[0], sum_x = sum_w * x[0];
    for (int i = 1; i < 32; ++i) {
        sum_w += weights[i];
        sum_x += weights[i] * x[i];
    }
    low = PICK(f8, i8, low > ALL8(0), ALL8(0), low);
    i8 ordinary = high > low;
    for (int lane = 0; lane < 8; ++lane)
        if (!ordinary[lane]) return 0;
    f8 inverse = ALL8((float)top) / (high - low), scale = ALL8(1) / inverse, best = ALL8(0);
    for (int i = 0; i < 32; ++i) {
        i8 l = ROUND(i8, inverse * (x[i] - low));
        f8 difference = scale * FLOAT(f8, CLAMP(i8, l, 0, top)) + low - x[i];
        best += weights[i] * (difference * difference);
    }
    for (int step = 0; step <= steps; ++step) {
        inverse = ALL8(from + 0.1f * step + top) / (high - low);
        f8 sum_l = ALL8(0), sum_l2 = ALL8(0), sum_xl = ALL8(0);
        for (int i = 0; i < 32; ++i) {
            i8 l = ROUND(i8, inverse * (x[i] - low));
            f8 level = FLOAT(f8, CLAMP(i8, l, 0, top)), weighed = weights[i] * level;
            tried[i] = level;
            sum_l += weighed;
            sum_l2 += weighed * level;
            sum_xl += weighed * x[i];
        }
        f8 determinant = sum_w * sum_l2 - sum_l * sum_l;
        f8 this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        f8 this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        i8 above = this_low > ALL8(0);
        this_scale = PICK(f8, i8, above, sum_xl / sum_l2, this_scale);
        this_low = PICK(f8, i8, above, ALL8(0), this_low);
        f8 error = ALL8(0);
        for (int i = 0; i < 32; ++i) {
            f8 difference = this_scale * tried[i] + this_low - x[i];
            error += weights[i] * (difference * difference);
        }
        i8 better = (determinant > ALL8(0)) & (error < best);
        best = PICK(f8, i8, better, error, best);
        scale = PICK(f8, i8, better, this_scale, scale);
        low = PICK(f8, i8, better, this_low, low);
    }
    *scales = scale;
    *mins = -low;
    return 1;
}

/* One super-block of Q4_K (`top` 15) or Q5_K (31); 0 = ggml has to do it. */
static int block_k(const float *source, uint8_t *out, int top) {
    f8 x[32], scales, mins;
    for (int i = 0; i < 32; ++i)
        for (int lane = 0; lane < 8; ++lane) x[i][lane] = source[32 * lane + i];
    if (!scale_and_min(x, top, top == 15 ? -1.f : -0.5f, top == 15 ? 20 : 15, &scales, &mins)) return 0;
    float most_scale = 0, most_min = 0;
    for (int lane = 0; lane < 8; ++lane) {
        if (scales[lane] > most_scale) most_scale = scales[lane];
        if (mins[lane] > most_min) most_min = mins[lane];
    }
    float inverse_scale = most_scale > 0 ? 63.f / most_scale : 0.f, inverse_min = most_min > 0 ? 63.f / most_min : 0.f;
    uint16_t d = half_of(most_scale / 63.f), dmin = half_of(most_min / 63.f);
    uint8_t *packed = out + 4, levels[256];
    f8 step, shift;
    memset(packed, 0, 12);
    for (int j = 0; j < 8; ++j) {
        uint8_t s = (uint8_t)nearest(inverse_scale * scales[j]), m = (uint8_t)nearest(inverse_min * mins[j]);
        s = s > 63 ? 63 : s;
        m = m > 63 ? 63 : m;
        if (j < 4) {
            packed[j] = s;
            packed[j + 4] = m;
        } else {
            packed[j + 4] = (uint8_t)((s & 15) | (m & 15) << 4);
            packed[j - 4] |= (uint8_t)(s >> 4 << 6);
            packed[j] |= (uint8_t)(m >> 4 << 6);
        }
        step[j] = of_half(d) * s;
        shift[j] = of_half(dmin) * m;
        if (step[j] == 0) return 0;
    }
    memcpy(out, &d, 2);
    memcpy(out + 2, &dmin, 2);
    for (int i = 0; i < 32; ++i) {
        i8 l = ROUND(i8, (x[i] + shift) / step);
        l = CLAMP(i8, l, 0, top);
        for (int lane = 0; lane < 8; ++lane) levels[32 * lane + i] = (uint8_t)l[lane];
    }
    uint8_t *low = out + 16;
    if (top == 31) {
        uint8_t *fifth = out + 16;
        low = out + 48;
        for (int i = 0; i < 32; ++i) {
            uint8_t bits = 0;
            for (int lane = 0; lane < 8; ++lane) bits |= (uint8_t)(levels[32 * lane + i] >> 4 << lane);
            fifth[i] = bits;
        }
    }
    for (int pair = 0; pair < 4; ++pair)
        for (int i = 0; i < 32; ++i)
            low[32 * pair + i] = (uint8_t)((levels[64 * pair + i] & 15) | (levels[64 * pair + 32 + i] & 15) << 4);
    return 1;
}

/* One super-block of Q6_K; 0 = ggml has to do it. */
static int block_6(const float *source, uint8_t *out) {
    f16 x[16], largest = ALL16(0), signed_largest = ALL16(0);
    for (int i = 0; i < 16; ++i)
        for (int lane = 0; lane < 16; ++lane) x[i][lane] = source[16 * lane + i];
    for (int i = 0; i < 16; ++i) {
        f16 size = (f16)((i16)x[i] & 0x7fffffff);
        i16 larger = size > largest;
        largest = PICK(f16, i16, larger, size, largest);
        signed_largest = PICK(f16, i16, larger, x[i], signed_largest);
    }
    i16 ordinary = largest >= ALL16(1e-15f);
    for (int lane = 0; lane < 16; ++lane)
        if (!ordinary[lane]) return 0;
    f16 scale = ALL16(0), best = ALL16(0);
    for (int turn = 0; turn < 19; ++turn) {
        int step = turn == 0 ? 0 : turn <= 9 ? turn - 10 : turn - 9; /* 0 first, then -9 to -1 and 1 to 9 */
        f16 inverse = ALL16(-(32 + 0.1f * step)) / signed_largest, sum_lx = ALL16(0), sum_l2 = ALL16(0);
        for (int i = 0; i < 16; ++i) {
            i16 l = ROUND(i16, inverse * x[i]);
            f16 level = FLOAT(f16, CLAMP(i16, l, -32, 31)), weight = x[i] * x[i];
            sum_lx += weight * x[i] * level;
            sum_l2 += weight * level * level;
        }
        i16 positive = sum_l2 > ALL16(0), better = positive & (sum_lx * sum_lx > best * sum_l2);
        if (step == 0) better = positive;
        f16 this_scale = sum_lx / sum_l2;
        scale = PICK(f16, i16, better, this_scale, scale);
        best = PICK(f16, i16, better, this_scale * sum_lx, best);
    }
    float most = 0, most_size = 0;
    for (int lane = 0; lane < 16; ++lane) {
        float size = fabsf(scale[lane]);
        if (size > most_size) {
            most_size = size;
            most = scale[lane];
        }
    }
    if (most_size < 1e-15f) return 0;
    float inverse = -128.f / most;
    uint16_t d = half_of(1 / inverse);
    uint8_t levels[256], *low = out, *high = out + 128;
    int8_t *packed = (int8_t *)(out + 192);
    f16 step;
    for (int lane = 0; lane < 16; ++lane) {
        int s = nearest(inverse * scale[lane]);
        packed[lane] = (int8_t)(s > 127 ? 127 : s);
        step[lane] = of_half(d) * packed[lane];
        if (step[lane] == 0) return 0;
    }
    memcpy(out + 208, &d, 2);
    for (int i = 0; i < 16; ++i) {
        i16 l = ROUND(i16, x[i] / step);
        l = CLAMP(i16, l, -32, 31) + 32;
        for (int lane = 0; lane < 16; ++lane) levels[16 * lane + i] = (uint8_t)l[lane];
    }
    for (int half = 0; half < 2; ++half) {
        const uint8_t *l = levels + 128 * half;
        for (int i = 0; i < 32; ++i) {
            low[64 * half + i] = (uint8_t)((l[i] & 15) | (l[i + 64] & 15) << 4);
            low[64 * half + 32 + i] = (uint8_t)((l[i + 32] & 15) | (l[i + 96] & 15) << 4);
            high[32 * half + i] = (uint8_t)(l[i] >> 4 | l[i + 32] >> 4 << 2 | l[i + 64] >> 4 << 4 | l[i + 96] >> 4 << 6);
        }
    }
    return 1;
}

/* `blocks` super-blocks of 256 weights; `type` is ggml's number: 12 = Q4_K, 13 = Q5_K, 14 = Q6_K. */
void stillhouse_quantize(int type, const float *x, uint8_t *out, int64_t blocks, chunk fallback) {
    int size = type == 12 ? 144 : type == 13 ? 176 : 210;
    for (int64_t b = 0; b < blocks; ++b, x += 256, out += size) {
        int done = type == 14 ? block_6(x, out) : block_k(x, out, type == 12 ? 15 : 31);
        if (!done) fallback(type, x, out, 0, 1, 256, 0);
    }
}
