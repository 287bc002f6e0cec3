// C = A B in single precision for the small and the narrow matrices of latent variable models.
//
// A latent dimension of 8 leaves a general BLAS at a tenth of the machine. Here a block of MR rows of C by one
// or two vectors of its columns stays in registers while k runs (Goto and van de Geijn 2008, section 4), and
// only B is packed. Large square products are better left to BLAS: `gemm_suits` says which are not.
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

// MR rows by NV vectors of W columns; b is packed: row k at b + k * ldb.
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
        if (columns == NV * W)
            std::memcpy(c + r * ldc, sum[r], sizeof sum[r]);
        else
            std::memcpy(c + r * ldc, sum[r], columns * sizeof(float));
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

// Some columns of B side by side and padded with zeros to a width that the kernel reads.
template <int WIDE>
const float* gemm_pack(int64_t K, int64_t columns, Matrix b) {
    static thread_local std::vector<float> packed;
    packed.resize(std::max<size_t>(packed.size(), K * WIDE));
    for (int64_t k = 0; k < K; ++k) {
        float* row = packed.data() + k * WIDE;
        for (int64_t j = 0; j < columns; ++j) row[j] = b.data[k * b.row_stride + j * b.col_stride];
        for (int64_t j = columns; j < WIDE; ++j) row[j] = 0.0f;
    }
    return packed.data();
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
    auto part = [&](int64_t first, int64_t last) {
        auto rows = N <= 8 ? gemm_rows<8> : gemm_rows<WIDTH>;
        rows(last - first, N, K, offset(a, first, 0), b, c + first * ldc, ldc);
    };
    const int64_t share = (M / THREADS + 7) / 8 * 8;
    if (THREADS == 1 || M * N * K < (1 << 20) || share * (THREADS - 1) >= M) {
        part(0, M);
        return;
    }
#pragma omp parallel for num_threads(THREADS) schedule(static, 1)
    for (int t = 0; t < THREADS; ++t) part(t * share, t + 1 == THREADS ? M : (t + 1) * share);
}

// Whether `gemm` is quicker than BLAS; the bounds were measured on AVX-512 and AVX2.
inline bool gemm_suits(int64_t M, int64_t N, int64_t K, bool transposed_b) {
    const int64_t work = M * N * K;
    if (transposed_b && M < 32 && work > (1 << 15)) return false;  // packing B would cost more than the product
    return work <= (1 << 20) || (std::min({M, N, K}) <= 32 && work <= (1 << 23));
}

}  // namespace pyrolvm

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
