// C = A B in single precision for the small and the narrow matrices of latent variable models.
//
// A latent dimension of 8 leaves a general BLAS at a tenth of the machine. Here a block of MR rows of C by one
// or two vectors of its columns stays in registers while k runs (Goto and van de Geijn 2008, section 4), and
// only parts of B are packed. Wide products are left to a BLAS that is as good: `gemm_suits` says which.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// a product is summed without rounding in between, whatever the flags of the rest
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif

namespace pyrolvm {

struct Matrix {
    const float* data;
    int64_t row_stride, col_stride;
};

template <int W>
struct Lanes {
    typedef float type __attribute__((vector_size(W * sizeof(float)), aligned(sizeof(float)), may_alias));
};

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif

// MR rows by NV vectors of W columns; row k of B is at b + k * ldb.
template <int W, int MR, int NV>
inline void gemm_block(
    int64_t K, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t columns) {
    typedef typename Lanes<W>::type Vector;
    Vector sum[MR][NV] = {};
    for (int64_t k = 0; k < K; ++k) {
        Vector row[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) row[v] = *reinterpret_cast<const Vector*>(b + k * ldb + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
            const float x = a.data[r * a.row_stride + k * a.col_stride];
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) sum[r][v] += x * row[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
        float edge[NV * W];
        float* line = columns == NV * W ? c + r * ldc : edge;
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) *reinterpret_cast<Vector*>(line + v * W) = sum[r][v];
        if (line == edge) std::memcpy(c + r * ldc, edge, columns * sizeof(float));
    }
}

inline Matrix offset(Matrix m, int64_t row, int64_t column) {
    m.data += row * m.row_stride + column * m.col_stride;
    return m;
}

template <int W, int NV>
void gemm_columns(
    int64_t M, int64_t K, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t columns) {
    constexpr int MR = NV == 2 && WIDTH == 8 ? 6 : 8;  // what the registers hold
    int64_t i = 0;
    for (; i + MR <= M; i += MR)
        gemm_block<W, MR, NV>(K, offset(a, i, 0), b, ldb, c + i * ldc, ldc, columns);
    for (; i + 4 <= M; i += 4)
        gemm_block<W, 4, NV>(K, offset(a, i, 0), b, ldb, c + i * ldc, ldc, columns);
    for (; i + 2 <= M; i += 2)
        gemm_block<W, 2, NV>(K, offset(a, i, 0), b, ldb, c + i * ldc, ldc, columns);
    for (; i < M; ++i)
        gemm_block<W, 1, NV>(K, offset(a, i, 0), b, ldb, c + i * ldc, ldc, columns);
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// dst[k * stride + j] = src[j * ld + k] for j, k < 4
inline void transpose_four(const float* src, int64_t ld, float* dst, int64_t stride) {
    typedef int32_t Index __attribute__((vector_size(16)));
    Four r[4];
    for (int j = 0; j < 4; ++j) r[j] = *reinterpret_cast<const Four*>(src + j * ld);
#if defined(__clang__)
    const Four a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const Four c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    const Four t[4] = {
        __builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
        __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
#else
    const Index low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, last = {2, 3, 6, 7};
    const Four a = __builtin_shuffle(r[0], r[1], low), b = __builtin_shuffle(r[2], r[3], low);
    const Four c = __builtin_shuffle(r[0], r[1], high), d = __builtin_shuffle(r[2], r[3], high);
    const Four t[4] = {
        __builtin_shuffle(a, b, first), __builtin_shuffle(a, b, last), __builtin_shuffle(c, d, first),
        __builtin_shuffle(c, d, last)};
#endif
    for (int k = 0; k < 4; ++k) *reinterpret_cast<Four*>(dst + k * stride) = t[k];
}

// Some columns of B side by side and padded with zeros to a width that the kernel reads.
template <int WIDE>
const float* gemm_pack(int64_t K, int64_t columns, Matrix b) {
    static thread_local std::vector<float> packed;
    packed.resize(std::max<size_t>(packed.size(), K * WIDE));
    float* out = packed.data();
    const int64_t fours = b.row_stride == 1 ? K / 4 * 4 : 0, whole = columns / 4 * 4;
    for (int64_t k = 0; k < fours; k += 4)
        for (int64_t j = 0; j < whole; j += 4)
            transpose_four(b.data + k + j * b.col_stride, b.col_stride, out + k * WIDE + j, WIDE);
    for (int64_t k = 0; k < K; ++k) {
        float* row = out + k * WIDE;
        for (int64_t j = k < fours ? whole : 0; j < columns; ++j)
            row[j] = b.data[k * b.row_stride + j * b.col_stride];
        for (int64_t j = columns; j < WIDE; ++j) row[j] = 0.0f;
    }
    return out;
}

template <int W, int NV>
void gemm_panel(
    int64_t M, int64_t K, Matrix a, Matrix b, float* c, int64_t ldc, int64_t columns) {
    constexpr int WIDE = W * NV;
    if (b.col_stride == 1 && columns == WIDE)
        gemm_columns<W, NV>(M, K, a, b.data, b.row_stride, c, ldc, columns);
    else
        gemm_columns<W, NV>(M, K, a, gemm_pack<WIDE>(K, columns, b), WIDE, c, ldc, columns);
}

template <int W>
void gemm_rows(
    int64_t M, int64_t N, int64_t K, Matrix a, Matrix b, float* c, int64_t ldc) {
    for (int64_t j = 0; j < N; j += 2 * W) {
        const Matrix own = offset(b, 0, j);
        if (N - j > W)
            gemm_panel<W, 2>(M, K, a, own, c + j, ldc, std::min<int64_t>(2 * W, N - j));
        else
            gemm_panel<W, 1>(M, K, a, own, c + j, ldc, N - j);
    }
}

// c [M, N] with rows `ldc` apart = a [M, K] b [K, N].
template <int THREADS>
void gemm(int64_t M, int64_t N, int64_t K, Matrix a, Matrix b, float* c, int64_t ldc) {
    auto part = [&](int64_t i, int64_t j, int64_t m, int64_t n) {
        auto rows = n <= 8 ? gemm_rows<8> : gemm_rows<WIDTH>;
        if (m > 0 && n > 0) rows(m, n, K, offset(a, i, 0), offset(b, 0, j), c + i * ldc + j, ldc);
    };
    if (THREADS == 1 || M * N * K < (1 << 20)) {
        part(0, 0, M, N);
        return;
    }
    // by columns where B is packed, so that none of it is packed twice, and where rows are few
    const bool wide = (b.col_stride != 1 || M < THREADS * 32) && N >= THREADS * 4 * WIDTH;
    const int64_t whole = wide ? N : M, unit = wide ? WIDTH : 8;
    const int64_t share = (whole + THREADS * unit - 1) / (THREADS * unit) * unit;
#pragma omp parallel for num_threads(THREADS) schedule(static, 1)
    for (int t = 0; t < THREADS; ++t) {
        const int64_t first = std::min(t * share, whole), count = std::min(share, whole - first);
        if (wide)
            part(0, first, M, count);
        else
            part(first, 0, count, N);
    }
}

// Whether `gemm` is quicker than a BLAS that is as good as it up to `blas` multiplications.
inline bool gemm_suits(int64_t M, int64_t N, int64_t K, bool transposed_b, int64_t blas) {
    const int64_t work = M * N * K;
    if (transposed_b && M < 32 && work > (1 << 15)) return false;  // packing B would cost more than the product
    return (work <= blas && K <= 4096) || (std::min({M, N, K}) <= 32 && work <= (1 << 23));
}

}  // namespace pyrolvm

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
