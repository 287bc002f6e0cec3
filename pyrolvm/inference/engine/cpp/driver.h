// The steps of a program made of pieces: see driver.py, which writes `pieces`, `once`, `each` and `set_numbers`.

namespace pyrolvm {

template <typename T>
static RAIIAtenTensorHandle number(int32_t dtype, double value) {
    AtenTensorHandle made;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(0, nullptr, nullptr, dtype, aoti_torch_device_type_cpu(), 0, &made));
    RAIIAtenTensorHandle owned(made);
    *static_cast<T*>(owned.data_ptr()) = static_cast<T>(value);
    return owned;
}

}  // namespace pyrolvm
