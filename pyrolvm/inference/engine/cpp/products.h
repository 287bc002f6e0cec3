// Matrix products of inductor's code by `gemm.h` where that is quicker, else by BLAS.
//
// Before it: inductor's own headers, gemm.h, NUM_THREADS and BLAS_FROM (see native.py).

namespace pyrolvm {

inline Matrix matrix(AtenTensorHandle tensor) {
    void* data;
    int64_t* strides;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
    return {static_cast<const float*>(data), strides[0], strides[1]};
}

inline bool is_float(AtenTensorHandle tensor) {
    int32_t type;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &type));
    return type == aoti_torch_dtype_float32();
}

inline bool multiply(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
    if (!is_float(out)) return false;
    int64_t *sizes, K;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(out, &sizes));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(a, 1, &K));
    const Matrix left = matrix(a), right = matrix(b), target = matrix(out);
    if (target.col_stride != 1 || !gemm_suits(sizes[0], sizes[1], K, right.col_stride != 1, BLAS_FROM)) return false;
    gemm<NUM_THREADS>(
        sizes[0], sizes[1], K, left, right, const_cast<float*>(target.data), target.row_stride);
    return true;
}

inline AOTITorchError mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
    return multiply(out, a, b) ? AOTI_TORCH_SUCCESS : aoti_torch_cpu_mm_out(out, a, b);
}

}  // namespace pyrolvm
