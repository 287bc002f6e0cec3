// What stands around a step that inductor wrote: the loop over the steps, and narrow matrix products.
//
// Before it: inductor's own headers, and NUM_INPUTS, NUM_THREADS, STEPS_PER_CALL (see native.py).

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
    if (target.col_stride != 1 || !gemm_suits(sizes[0], sizes[1], K, right.col_stride != 1)) return false;
    gemm<NUM_THREADS>(
        sizes[0], sizes[1], K, left, right, const_cast<float*>(target.data), target.row_stride);
    return true;
}

inline AOTITorchError mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
    return multiply(out, a, b) ? AOTI_TORCH_SUCCESS : aoti_torch_cpu_mm_out(out, a, b);
}

static thread_local int64_t num_steps;

}  // namespace pyrolvm

void inductor_entry_impl(AtenTensorHandle* inputs, AtenTensorHandle* outputs);

// Takes `num_steps` steps; the tensors behind `inputs` stay the caller's. Returns what went wrong, or null.
extern "C" const char* pyrolvm_run(int64_t num_steps, AtenTensorHandle* inputs) {
    static thread_local std::string error;
    try {
        std::vector<AtenTensorHandle> own(NUM_INPUTS);
        AtenTensorHandle none[1];
        while (num_steps > 0) {
            pyrolvm::num_steps = std::min<int64_t>(num_steps, STEPS_PER_CALL);
            num_steps -= pyrolvm::num_steps;
            for (int i = 0; i < NUM_INPUTS; ++i) aoti_torch_new_tensor_handle(inputs[i], &own[i]);
            inductor_entry_impl(own.data(), none);
            if (PyErr_Occurred()) return nullptr;  // ctypes raises it
        }
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    } catch (...) {
        return "an unknown error";
    }
}
