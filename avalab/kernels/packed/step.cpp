// One token through a model of the Llama family whose linear layers are packed: the whole step in one call.
//
// Per block: x += o(attention(rotated q, k, v of norm(x))), x += down(silu(gate(norm(x))) up(norm(x))); norms are
// RMSNorm. Keys and values of all tokens so far lie in a static cache, head by head. Arithmetic is float32.

#include "packed.cpp"

struct Block {
    const Weight *q, *k, *v, *o, *gate, *up, *down;
    const float *q_bias, *k_bias, *v_bias;  // or null
    const float *input_norm, *mlp_norm;
    void *keys, *values;  // [kv_heads capacity head_dim], float32 or bfloat16
};

struct Model {
    const Block *blocks;
    const Weight *head;
    const float *norm, *cosines, *sines;  // tables [capacity head_dim]
    int64_t layers, hidden, heads, kv_heads, head_dim, mlp, capacity;
    float epsilon, scaling;
    int32_t bfloat16;  // the cache's type
};

static void rms_norm(const float *x, const float *gain, int64_t size, float epsilon, float *y) {
    double sum = 0;
    for (int64_t at = 0; at < size; at++) sum += (double)x[at] * x[at];
    float factor = 1.0f / std::sqrt((float)(sum / size) + epsilon);
    for (int64_t at = 0; at < size; at++) y[at] = gain[at] * (x[at] * factor);
}

static void add(float *x, const float *y, int64_t size) {
    if (y)
        for (int64_t at = 0; at < size; at++) x[at] += y[at];
}

static void rotate(float *x, int64_t heads, int64_t size, const float *cosines, const float *sines) {
    int64_t half = size / 2;
    for (float *end = x + heads * size; x < end; x += size)
        for (int64_t at = 0; at < half; at++) {
            float first = x[at], second = x[at + half];
            x[at] = first * cosines[at] - second * sines[at];
            x[at + half] = second * cosines[at + half] + first * sines[at + half];
        }
}

static inline F sixteen(const float *from) {
    F found;
    memcpy(&found, from, 64);
    return found;
}

static inline F sixteen(const uint16_t *from) {
    N narrow;
    memcpy(&narrow, from, 32);
    return (F)(__builtin_convertvector(narrow, U) << 16);
}

template <typename T>
static inline float dot(const float *a, const T *b, int64_t size) {
    F sum = F{};
    for (int64_t at = 0; at < size; at += LANES) sum += sixteen(a + at) * sixteen(b + at);
    float all = 0;
    for (int lane = 0; lane < LANES; lane++) all += sum[lane];
    return all;
}

// One query head over `count` tokens: scores, softmax, and the values' weighted sum.
template <typename T>
static void attend(const float *query, const T *keys, const T *values, int64_t count, int64_t size, float scaling,
                   float *scores, float *out) {
    float most = -INFINITY, sum = 0;
    for (int64_t t = 0; t < count; t++) {
        scores[t] = dot(query, keys + t * size, size) * scaling;
        if (scores[t] > most) most = scores[t];
    }
    for (int64_t t = 0; t < count; t++) sum += scores[t] = std::exp(scores[t] - most);
    for (int64_t at = 0; at < size; at += LANES) {
        F total = F{};
        for (int64_t t = 0; t < count; t++) total += sixteen(values + t * size + at) * scores[t];
        total /= sum;
        memcpy(out + at, &total, 64);
    }
}

static void attention(const Model &m, const Block &b, const float *q, int64_t count, float *out, int threads) {
    static thread_local std::vector<float> room;
    int64_t shared = m.heads / m.kv_heads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 256)
    for (int64_t h = 0; h < m.heads; h++) {
        room.resize(count);
        int64_t from = h / shared * m.capacity * m.head_dim, at = h * m.head_dim;
        if (m.bfloat16)
            attend(q + at, (const uint16_t *)b.keys + from, (const uint16_t *)b.values + from, count, m.head_dim,
                   m.scaling, room.data(), out + at);
        else
            attend(q + at, (const float *)b.keys + from, (const float *)b.values + from, count, m.head_dim, m.scaling,
                   room.data(), out + at);
    }
}

static void keep(void *cache, const float *x, int64_t to, const Model &m) {
    if (!m.bfloat16) {
        memcpy((float *)cache + to, x, m.head_dim * 4);
        return;
    }
    for (int64_t at = 0; at < m.head_dim; at++) ((uint16_t *)cache)[to + at] = to_bfloat16(x[at]);
}

extern "C" {

// x[hidden] is the token's embedding and is overwritten; logits[vocabulary] may be null while a prompt is read.
void packed_step(const Model *model, float *x, int64_t position, float *logits, int threads) {
    static thread_local std::vector<float> memory, sums;
    const Model &m = *model;
    int64_t width = m.heads * m.head_dim, shared = m.kv_heads * m.head_dim;
    memory.resize(2 * m.hidden + 2 * width + 2 * shared + 2 * m.mlp);
    float *normed = memory.data(), *result = normed + m.hidden, *q = result + m.hidden, *mixed = q + width;
    float *k = mixed + width, *v = k + shared, *gate = v + shared, *up = gate + m.mlp;
    const float *cosines = m.cosines + position * m.head_dim, *sines = m.sines + position * m.head_dim;
    for (int64_t layer = 0; layer < m.layers; layer++) {
        const Block &b = m.blocks[layer];
        rms_norm(x, b.input_norm, m.hidden, m.epsilon, normed);
        multiply(*b.q, normed, 1, q, threads, sums);
        multiply(*b.k, normed, 1, k, threads, sums);
        multiply(*b.v, normed, 1, v, threads, sums);
        add(q, b.q_bias, width);
        add(k, b.k_bias, shared);
        add(v, b.v_bias, shared);
        rotate(q, m.heads, m.head_dim, cosines, sines);
        rotate(k, m.kv_heads, m.head_dim, cosines, sines);
        for (int64_t h = 0; h < m.kv_heads; h++) {
            int64_t to = (h * m.capacity + position) * m.head_dim;
            keep(b.keys, k + h * m.head_dim, to, m);
            keep(b.values, v + h * m.head_dim, to, m);
        }
        attention(m, b, q, position + 1, mixed, threads);
        multiply(*b.o, mixed, 1, result, threads, sums);
        add(x, result, m.hidden);
        rms_norm(x, b.mlp_norm, m.hidden, m.epsilon, normed);
        multiply(*b.gate, normed, 1, gate, threads, sums);
        multiply(*b.up, normed, 1, up, threads, sums);
        for (int64_t at = 0; at < m.mlp; at++) up[at] *= gate[at] / (1.0f + std::exp(-gate[at]));
        multiply(*b.down, up, 1, result, threads, sums);
        add(x, result, m.hidden);
    }
    if (!logits) return;
    rms_norm(x, m.norm, m.hidden, m.epsilon, normed);
    multiply(*m.head, normed, 1, logits, threads, sums);
}

}  // extern "C"
