// The operator `pyrolvm::shared_sum` for C++ that inductor wrote, after shared_sum.h and inductor's own headers.
static AOTITorchError aoti_torch_cpu_shared_sum(AtenTensorHandle value, AtenTensorHandle memory, AtenTensorHandle place, AtenTensorHandle* made) {
    int64_t dims, length, *sizes, *strides;
    int32_t dtype;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(value, &dims));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(value, &length));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(value, &sizes));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(value, &strides));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(value, &dtype));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, made));
    const int32_t kinds[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_int64()};
    const int64_t kind = std::find(kinds, kinds + 3, dtype) - kinds;
    void *from, *to, *shared, *where;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(value, &from));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*made, &to));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(memory, &shared));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(place, &where));
    pyrolvm::shared_sum(shared, where, from, to, length, kind);
    return AOTI_TORCH_SUCCESS;
}
