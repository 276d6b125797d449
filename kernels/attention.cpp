// Causal attention and its gradients on a CPU, float32 and, where the processor multiplies it, bfloat16 (sums in float32).
// A thread has one head of one sequence at a time, and R queries of it: their scores with all the keys they see stay in the
// cache, so nothing of size T x T goes through memory. Numbers are multiplied in words of 32 bits: one float, or the two
// bfloat16 whose products one instruction adds up. Compiled by kernels.py for the processor it runs on.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
constexpr long W = 16, M = 8, R = 32;  // floats in a register; rows of a tile, two registers wide; queries at a time
#elif defined(__AVX2__)
constexpr long W = 8, M = 6, R = 48;
#else
#error "written for AVX2 and AVX-512; on others it was not tried, and torch's own attention runs"
#endif
constexpr long N = 2 * W;
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t bfloat16;
template <class T> constexpr long PER_WORD = 4 / sizeof(T);

template <class Vector> static inline Vector load(const void* p) { Vector v; memcpy(&v, p, sizeof v); return v; }
template <class Vector> static inline void store(void* p, Vector v) { memcpy(p, &v, sizeof v); }

// What depends on the type: sum + a * b for a word and a register of words; a register of floats stored as numbers; and as
// words, with the next row's where a word holds two.
template <class T> struct Type;

template <> struct Type<float> {
    static inline Floats add(Floats sum, uint32_t a, Words b) { float f; memcpy(&f, &a, 4); return sum + f * (Floats)b; }
    static inline void put(float* p, Floats x) { store(p, x); }
    static inline Words words(const Floats* rows) { return (Words)rows[0]; }
};

#ifdef __AVX512BF16__
#include <immintrin.h>
template <> struct Type<bfloat16> {
    static inline Floats add(Floats sum, uint32_t a, Words b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    }
    static inline void put(bfloat16* p, Floats x) { store(p, _mm512_cvtneps_pbh(x)); }
    static inline Words words(const Floats* rows) {
        typedef uint16_t Halves __attribute__((vector_size(2 * W)));
        auto wide = [](Floats x) { return __builtin_convertvector((Halves)_mm512_cvtneps_pbh(x), Words); };
        return wide(rows[0]) | wide(rows[1]) << 16;
    }
};
#endif

// AMX: tiles of 16 rows of 16 words. A process asks the system for leave to use them; their shape is a thread's, and that of
// whoever had them before is put back.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define AMX
#include <sys/syscall.h>
#include <unistd.h>
static const bool TILES = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

static inline void fence() { asm volatile("" ::: "memory"); }  // to GCC 12 these instructions do not read memory

struct Tiles {
    struct alignas(64) Shape { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } before;
    Tiles() {
        Shape shape{1};
        for (int tile = 0; tile < 8; tile++) shape.row_bytes[tile] = 64, shape.rows[tile] = 16;
        if (!TILES) return;
        fence();
        _tile_storeconfig(&before);
        _tile_loadconfig(&shape);
    }
    ~Tiles() {
        if (TILES) { _tile_loadconfig(&before); }
    }
};

static void multiply_tiles(long m, long n, long K, const uint32_t* a, long lda, const uint32_t* b, long ldb, float* c, long ldc, bool more) {
    fence();
    for (long j = 0; j < n; j += 32)
        for (long i = 0; i < m; i += 32) {
            float *top = c + i * ldc + j, *bottom = top + 16 * ldc;
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            if (more) {
                _tile_loadd(0, top, 4 * ldc); _tile_loadd(1, top + 16, 4 * ldc);
                _tile_loadd(2, bottom, 4 * ldc); _tile_loadd(3, bottom + 16, 4 * ldc);
            }
            for (long k = 0; k < K; k += 16) {
                const uint32_t *rows = a + i * lda + k, *columns = b + k * ldb + j;
                _tile_loadd(4, rows, 4 * lda); _tile_loadd(6, columns, 4 * ldb);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, columns + 16, 4 * ldb);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, rows + 16 * lda, 4 * lda);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, top, 4 * ldc); _tile_stored(1, top + 16, 4 * ldc);
            _tile_stored(2, bottom, 4 * ldc); _tile_stored(3, bottom + 16, 4 * ldc);
        }
}
#else
struct Tiles {};
#endif

// `rows` rows and N columns of C = A B, or +=: sums in registers.
template <class T, long rows>
static inline void tile(long K, const uint32_t* a, long lda, const uint32_t* b, long ldb, float* c, long ldc, bool more) {
    Floats sum[rows][2] = {};
    if (more)
        for (long r = 0; r < rows; r++)
            for (long s = 0; s < 2; s++) sum[r][s] = load<Floats>(c + r * ldc + s * W);
    for (long k = 0; k < K; k++) {
        const Words left = load<Words>(b + k * ldb), right = load<Words>(b + k * ldb + W);
        for (long r = 0; r < rows; r++) {
            const uint32_t x = a[r * lda + k];
            sum[r][0] = Type<T>::add(sum[r][0], x, left);
            sum[r][1] = Type<T>::add(sum[r][1], x, right);
        }
    }
    for (long r = 0; r < rows; r++)
        for (long s = 0; s < 2; s++) store(c + r * ldc + s * W, sum[r][s]);
}

// C (m, n) = A B, or += with `more`: A (m, K) and B (K, n) in words, rows lda, ldb and ldc apart. m is even, n a multiple of N;
// all of 32 where there are tiles (16 words).
template <class T>
static inline void multiply(long m, long n, long K, const void* A, long lda, const uint32_t* b, long ldb, float* c, long ldc, bool more) {
    const uint32_t* a = (const uint32_t*)A;
#ifdef AMX
    if (sizeof(T) == 2 && TILES) return multiply_tiles(m, n, K, a, lda, b, ldb, c, ldc, more);
#endif
    for (long j = 0; j < n; j += N) {
        long i = 0;
        for (; i + M <= m; i += M) tile<T, M>(K, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, more);
        for (; i < m; i += 2) tile<T, 2>(K, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, more);
    }
}

struct Tensor { char* data; long b, h, t; };  // (B, H, T, D) with its strides in numbers, that of D is 1

template <class T> static T* head(const Tensor& x, long b, long h) { return (T*)x.data + b * x.b + h * x.h; }

// A head's n rows of D numbers, closed up; zeros follow, up to `padded` rows.
template <class T> static void read(const Tensor& x, long b, long h, long n, long padded, long D, T* out) {
    for (long t = 0; t < n; t++) memcpy(out + t * D, head<T>(x, b, h) + t * x.t, D * sizeof(T));
    std::fill(out + n * D, out + padded * D, T());
}

// Rows i to i + n of a head from floats, times a factor.
template <class T> static void write(const float* x, float factor, long n, long D, const Tensor& out, long b, long h, long i) {
    for (long t = 0; t < n; t++)
        for (long d = 0; d < D; d += W) Type<T>::put(head<T>(out, b, h) + (i + t) * out.t + d, load<Floats>(x + t * D + d) * factor);
}

// (n, D) numbers transposed, rows ld apart.
template <class T> static void turn(const T* x, long n, long D, T* out, long ld) {
    for (long first = 0; first < n; first += 16)
        for (long d = 0; d < D; d++)
            for (long t = first; t < first + 16; t++) out[d * ld + t] = x[t * D + d];
}

// Tokens 0 to n of a head from (D, n) floats, rows ld apart.
template <class T> static void write_turned(const float* x, long ld, long n, long D, const Tensor& out, long b, long h) {
    for (long t = 0; t < n; t++)
        for (long d = 0; d < D; d += W) {
            Floats row;
            for (long w = 0; w < W; w++) row[w] = x[(d + w) * ld + t];
            Type<T>::put(head<T>(out, b, h) + t * out.t + d, row);
        }
}

// (n, D) numbers as words of neighbours in a column, (n / PER_WORD, D).
template <class T> static void words_down(const T* x, long n, long D, uint32_t* out) {
    for (long t = 0; t < n; t += PER_WORD<T>)
        for (long d = 0; d < D; d++) {
            T pair[PER_WORD<T>];
            for (long e = 0; e < PER_WORD<T>; e++) pair[e] = x[(t + e) * D + d];
            memcpy(out + t / PER_WORD<T> * D + d, pair, 4);
        }
}

// (n, D) numbers as words of neighbours in a row, transposed: (D / PER_WORD, n), rows ld apart. n is a multiple of 16.
template <class T> static void words_across(const T* x, long n, long D, uint32_t* out, long ld) {
    for (long first = 0; first < n; first += 16)
        for (long d = 0; d < D; d += PER_WORD<T>)
            for (long t = first; t < first + 16; t++) memcpy(out + d / PER_WORD<T> * ld + t, x + t * D + d, 4);
}

// e^x for x <= 0 (from -86 on) to 2e-7 of it: 2^(n + f), n added to the exponent, a polynomial for f in [-1/2, 1/2].
static inline Floats exp(Floats x) {
    const float round = 12582912;  // 1.5 x 2^23: a sum with it has no room for a fraction
    x *= 1.44269504f;
    x = x < -125.f ? Floats{} - 125.f : x;  // in this order NaN stays NaN
    const Floats whole = x + round, f = x - (whole - round);
    const Floats p = 1.f + f * (6.9314718e-1f + f * (2.4022651e-1f + f * (5.5504109e-2f + f * (9.6181291e-3f +
                           f * (1.3333558e-3f + f * 1.5403530e-4f)))));
    return (Floats)((Ints)p + ((Ints)whole << 23));
}

// x for the keys from j on that query i sees, `other` for those behind it.
static inline Floats seen(Floats x, long i, long j, float other) {
    Ints lane;
    for (long w = 0; w < W; w++) lane[w] = w;
    return lane <= (int32_t)(i - j) ? x : Floats{} + other;
}

static inline float total(Floats x) { float sum = 0; for (long w = 0; w < W; w++) sum += x[w]; return sum; }

// Query i's scores with n keys become e^(score - largest), zero for those it does not see. Returns their sum; in `dot`, if
// asked for, what they and `other` multiply to.
static inline float exponentials(float* scores, long i, long n, float scale, const float* other = nullptr, float* dot = nullptr) {
    Floats top = Floats{} - INFINITY, sum = {}, product = {};
    for (long j = 0; j < n; j += W) {
        const Floats x = seen(load<Floats>(scores + j), i, j, -INFINITY);
        top = x > top ? x : top;
    }
    float largest = top[0];
    for (long w = 1; w < W; w++) largest = std::max(largest, top[w]);
    for (long j = 0; j < n; j += W) {
        const Floats e = seen(exp((load<Floats>(scores + j) - largest) * scale), i, j, 0);
        store(scores + j, e);
        sum += e;
        if (dot) product += e * load<Floats>(other + j);
    }
    if (dot) *dot = total(product);
    return total(sum);
}

// A thread's working memory: kept from call to call, so that its pages are zeroed once.
struct Space {
    float* next;
    explicit Space(long floats) {
        static thread_local std::vector<float> kept;
        if ((long)kept.size() < floats + 16) kept.resize(floats + 16);
        next = (float*)(((uintptr_t)kept.data() + 63) / 64 * 64);
    }
    template <class T> T* take(long n) { T* p = (T*)next; next += n * sizeof(T) / 4; return p; }
};

// Rows of scores are ld apart: 32 more than there are keys, as rows 4,096 bytes apart would share a few places of the cache
// (T = 1024 took a fifth longer than 960).
static long round_up(long T) { return (T + R - 1) / R * R; }

template <class T> static void forward(const Tensor* x, long B, long H, long tokens, long D) {
    const long n_all = round_up(tokens), ld = n_all + 32, E = PER_WORD<T>;
    const float scale = 1 / std::sqrt((float)D);
    #pragma omp parallel
    {
        Tiles tiles;
        Space space(5 * ld * D + 2 * R * ld + R * D);
        T *q = space.take<T>(n_all * D), *k = space.take<T>(n_all * D), *v = space.take<T>(n_all * D), *e = space.take<T>(R * ld);
        uint32_t *k_across = space.take<uint32_t>(ld * D / E), *v_down = space.take<uint32_t>(n_all * D / E);
        float *s = space.take<float>(R * ld), *y = space.take<float>(R * D);
        #pragma omp for schedule(dynamic)
        for (long bh = 0; bh < B * H; bh++) {
            const long b = bh / H, h = bh % H;
            read(x[0], b, h, tokens, n_all, D, q);
            read(x[1], b, h, tokens, n_all, D, k);
            read(x[2], b, h, tokens, n_all, D, v);
            words_across(k, n_all, D, k_across, ld);
            words_down(v, n_all, D, v_down);
            for (long i = 0; i < tokens; i += R) {
                const long n = i + R;  // keys
                float sums[R];
                multiply<T>(R, n, D / E, q + i * D, D / E, k_across, ld, s, ld, false);
                for (long r = 0; r < R; r++) {
                    sums[r] = exponentials(s + r * ld, i + r, n, scale);
                    for (long j = 0; j < n; j += W) Type<T>::put(e + r * ld + j, load<Floats>(s + r * ld + j));
                }
                multiply<T>(R, D, n / E, e, ld / E, v_down, D, y, D, false);
                for (long r = 0; r < std::min(R, tokens - i); r++) write<T>(y + r * D, 1 / sums[r], 1, D, x[3], b, h, i + r);
            }
        }
    }
}

// With p = softmax(s), s = scale q k^T and y = p v: dv = p^T dy, dp = dy v^T, ds = p (dp - sum(p dp)), dq = scale ds k,
// dk = scale ds^T q. p is computed again, which costs less than keeping it.
template <class T> static void backward(const Tensor* x, long B, long H, long tokens, long D) {
    const long n_all = round_up(tokens), ld = n_all + 32, E = PER_WORD<T>;
    const float scale = 1 / std::sqrt((float)D);
    #pragma omp parallel
    {
        Tiles tiles;
        Space space(11 * ld * D + 5 * R * ld + R * D);
        auto words = [&](long numbers) { return space.take<uint32_t>(numbers / E); };
        T *q = space.take<T>(n_all * D), *k = space.take<T>(n_all * D), *v = space.take<T>(n_all * D), *dy = space.take<T>(n_all * D);
        uint32_t *k_across = words(ld * D), *v_across = words(ld * D);
        uint32_t *k_down = words(n_all * D), *p_down = words(R * ld), *ds_down = words(R * ld);
        T *ds = space.take<T>(R * ld), *q_turned = space.take<T>(ld * D), *dy_turned = space.take<T>(ld * D);
        float *s = space.take<float>(R * ld), *dp = space.take<float>(R * ld), *dq = space.take<float>(R * D);
        float *dk = space.take<float>(D * ld), *dv = space.take<float>(D * ld);  // (D, tokens)
        #pragma omp for schedule(dynamic)
        for (long bh = 0; bh < B * H; bh++) {
            const long b = bh / H, h = bh % H;
            read(x[0], b, h, tokens, n_all, D, q);
            read(x[1], b, h, tokens, n_all, D, k);
            read(x[2], b, h, tokens, n_all, D, v);
            read(x[3], b, h, tokens, n_all, D, dy);
            words_across(k, n_all, D, k_across, ld);
            words_across(v, n_all, D, v_across, ld);
            words_down(k, n_all, D, k_down);
            turn(q, n_all, D, q_turned, ld);
            turn(dy, n_all, D, dy_turned, ld);
            std::fill(dk, dk + D * ld, 0.f);
            std::fill(dv, dv + D * ld, 0.f);
            for (long i = 0; i < tokens; i += R) {
                const long n = i + R;
                multiply<T>(R, n, D / E, q + i * D, D / E, k_across, ld, s, ld, false);
                multiply<T>(R, n, D / E, dy + i * D, D / E, v_across, ld, dp, ld, false);
                for (long r = 0; r < R; r += E) {  // as many rows as a word of dv's and dk's multiplications has
                    float sum[2], dot[2];
                    for (long e = 0; e < E; e++) sum[e] = exponentials(s + (r + e) * ld, i + r + e, n, scale, dp + (r + e) * ld, dot + e);
                    for (long j = 0; j < n; j += W) {
                        Floats p[2], g[2];
                        for (long e = 0; e < E; e++) {
                            const long at = (r + e) * ld + j;
                            p[e] = load<Floats>(s + at) * (1 / sum[e]);
                            g[e] = p[e] * (load<Floats>(dp + at) - dot[e] / sum[e]) * scale;
                            Type<T>::put(ds + at, g[e]);
                        }
                        store(p_down + r / E * ld + j, Type<T>::words(p));
                        store(ds_down + r / E * ld + j, Type<T>::words(g));
                    }
                }
                multiply<T>(R, D, n / E, ds, ld / E, k_down, D, dq, D, false);
                write<T>(dq, 1, std::min(R, tokens - i), D, x[4], b, h, i);
                multiply<T>(D, n, R / E, q_turned + i, ld / E, ds_down, ld, dk, ld, true);
                multiply<T>(D, n, R / E, dy_turned + i, ld / E, p_down, ld, dv, ld, true);
            }
            write_turned<T>(dk, ld, tokens, D, x[5], b, h);
            write_turned<T>(dv, ld, tokens, D, x[6], b, h);
        }
    }
}

// x: q, k, v, y; or q, k, v, dy, dq, dk, dv. D is a multiple of 32.
extern "C" void forward_float32(const Tensor* x, long B, long H, long T, long D) { forward<float>(x, B, H, T, D); }
extern "C" void backward_float32(const Tensor* x, long B, long H, long T, long D) { backward<float>(x, B, H, T, D); }
#ifdef __AVX512BF16__
extern "C" void forward_bfloat16(const Tensor* x, long B, long H, long T, long D) { forward<bfloat16>(x, B, H, T, D); }
extern "C" void backward_bfloat16(const Tensor* x, long B, long H, long T, long D) { backward<bfloat16>(x, B, H, T, D); }
#endif
