// y = x W^T + b for a few rows x: float32 throughout, but W read from memory as bfloat16 or int8. Compiled by kernels.py for the
// processor it runs on, from the compiler's own vectors: written for AVX2, AVX-512 and NEON, run so far on AVX2 and AVX-512.
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int W = 16, MOST = 16;  // floats in a register; rows at once, so that their sums fill the registers
#elif defined(__AVX2__)
constexpr int W = 8, MOST = 6;
#else
constexpr int W = 4, MOST = 4;
#endif
constexpr int V = 16 / W;  // registers for the 16 outputs of a block
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));

template <class Vector, class T>
static inline Vector load(const T* p) { Vector v; memcpy(&v, p, sizeof v); return v; }

// The 16 numbers at p as floats. (To this compiler eight bytes are not a vector: int8 is converted through 16 int16.)
static inline void widen(const uint16_t* p, Floats* v) {  // a bfloat16 is the upper half of a float32
    typedef uint16_t Halves __attribute__((vector_size(2 * W)));
    for (int i = 0; i < V; i++) v[i] = (Floats)(__builtin_convertvector(load<Halves>(p + W * i), Bits) << 16);
}
static inline void widen(const int8_t* p, Floats* v) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    typedef int16_t Shorts __attribute__((vector_size(32)));
    typedef int16_t Some __attribute__((vector_size(2 * W)));
    const Shorts all = __builtin_convertvector(load<Bytes>(p), Shorts);
    for (int i = 0; i < V; i++)
        v[i] = __builtin_convertvector(__builtin_convertvector(load<Some>((const int16_t*)&all + W * i), Ints), Floats);
}

// M rows times one block of W, (K, 16): each weight is widened once for all of them. x is (K, M of ld), y (M of N). A sum per row
// and output would wait for its own last addition when M is small: S sums, each of every S-th k.
template <int M, class T>
static void block(const float* x, long ld, const T* w, const float* scale, const float* bias, float* y, long K, long N) {
    constexpr int S = M == 1 ? 4 : M == 2 ? 2 : 1;
    Floats sum[S][M][V] = {};
    for (long k = 0; k < K; k += S)
        for (int s = 0; s < S; s++) {
            const T* q = w + 16 * (k + s);
            __builtin_prefetch(q + 2048 / sizeof(T));  // the hardware's own was not enough (on AVX-512, an earlier version)
            Floats v[V];
            widen(q, v);
            for (int m = 0; m < M; m++) {
                const float f = x[(k + s) * ld + m];
                for (int i = 0; i < V; i++) sum[s][m][i] += v[i] * f;
            }
        }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < V; i++) {
            for (int s = 1; s < S; s++) sum[0][m][i] += sum[s][m][i];
            const Floats out = sum[0][m][i] * load<Floats>(scale + W * i) + load<Floats>(bias + W * i);
            memcpy(y + m * N + W * i, &out, sizeof out);
        }
}

// Blocks in parallel, w is (N/16, K, 16); a block is read from memory for the first rows, and from the cache for the others.
template <class T>
static void all(const float* x, const T* w, const float* scale, const float* bias, float* y, long M, long K, long N) {
    #pragma omp parallel for
    for (long n = 0; n < N; n += 16)
        for (long m = 0, step; m < M; m += step) {
            const long left = M - m;
            step = left >= MOST ? MOST : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            auto part = step == MOST ? block<MOST, T> : step == 4 ? block<4, T> : step == 2 ? block<2, T> : block<1, T>;
            part(x + m, M, w + n * K, scale + n, bias + n, y + m * N + n, K, N);
        }
}

extern "C" void linear_bfloat16(const float* x, const uint16_t* w, const float* scale, const float* bias, float* y, long M, long K,
                                long N) { all(x, w, scale, bias, y, M, K, N); }
extern "C" void linear_int8(const float* x, const int8_t* w, const float* scale, const float* bias, float* y, long M, long K,
                            long N) { all(x, w, scale, bias, y, M, K, N); }
