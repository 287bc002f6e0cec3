// The operators of memory.py for C++ that inductor wrote, after shared_sum.h and inductor's own headers.

namespace pyrolvm {

static Array array(AtenTensorHandle tensor) {
    Array found;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &found.data));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &found.length));
    return found;
}

static std::vector<Array> arrays(const AtenTensorHandle* tensors, int64_t number) {
    std::vector<Array> found(number);
    std::transform(tensors, tensors + number, found.begin(), array);
    return found;
}

static int32_t type(AtenTensorHandle tensor) {
    int32_t found;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &found));
    return found;
}

static int64_t kind(AtenTensorHandle tensor) {
    const int32_t kinds[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_int64()};
    return std::find(kinds, kinds + 3, type(tensor)) - kinds;
}

}  // namespace pyrolvm

static AOTITorchError aoti_torch_cpu_shared_sum(AtenTensorHandle value, AtenTensorHandle memory, AtenTensorHandle place, AtenTensorHandle* made) {
    int64_t dims, *sizes, *strides;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(value, &dims));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(value, &sizes));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(value, &strides));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, pyrolvm::type(value), aoti_torch_device_type_cpu(), 0, made));
    const auto from = pyrolvm::array(value);
    pyrolvm::shared_sum(pyrolvm::array(memory).data, pyrolvm::array(place).data, from.data, pyrolvm::array(*made).data, from.length, pyrolvm::kind(value));
    return AOTI_TORCH_SUCCESS;
}

static AOTITorchError aoti_torch_cpu_shared_scatter(const AtenTensorHandle* values, int64_t number, AtenTensorHandle rest, double scale, int64_t length, AtenTensorHandle memory, AtenTensorHandle place, AtenTensorHandle* made) {
    const auto from = pyrolvm::arrays(values, number);
    const auto others = pyrolvm::array(rest);
    const int64_t size = length + others.length, stride = 1;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, pyrolvm::type(rest), aoti_torch_device_type_cpu(), 0, made));
    pyrolvm::shared_scatter(pyrolvm::array(memory).data, pyrolvm::array(place).data, from.data(), number, scale, others, pyrolvm::array(*made).data, length, pyrolvm::kind(rest));
    return AOTI_TORCH_SUCCESS;
}

static AOTITorchError aoti_torch_cpu_shared_gather_(const AtenTensorHandle* into, int64_t number, AtenTensorHandle share, AtenTensorHandle memory, AtenTensorHandle place, void* = nullptr) {
    const auto to = pyrolvm::arrays(into, number);
    const auto own = pyrolvm::array(share);
    pyrolvm::shared_gather(pyrolvm::array(memory).data, pyrolvm::array(place).data, own.data, own.length, to.data(), number, pyrolvm::kind(share));
    return AOTI_TORCH_SUCCESS;
}
