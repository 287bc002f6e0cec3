// Runs what driver.py wrote.

namespace pyrolvm {

using Values = std::vector<RAIIAtenTensorHandle>;

// The kernels of other pieces count on the strides that a piece's results have.
static void check_strides(int64_t piece, const std::vector<AtenTensorHandle>& made) {
    const int64_t* wanted = strides + first_stride[piece];
    for (auto handle : made) {
        const int64_t dims = *wanted++;
        int64_t *found, *sizes;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &found));
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
        for (int64_t i = 0; i < dims; ++i) {
            if (sizes[i] > 1 && found[i] != wanted[i]) {
                throw std::runtime_error("a part of the step has another layout in memory than was traced");
            }
        }
        wanted += dims;
    }
}

template <bool checking>
static void interpret(const int64_t* at, Values& values, std::vector<AtenTensorHandle>& given, std::vector<AtenTensorHandle>& made) {
    while (*at >= 0) {
        switch (*at++) {
            case 0: {  // call
                const int64_t piece = *at++;
                given.resize(*at++);
                for (auto& handle : given) aoti_torch_new_tensor_handle(values[*at++], &handle);
                made.resize(*at++);
                pieces[piece](given.data(), made.data());
                if (checking) check_strides(piece, made);
                for (auto handle : made) values[*at++] = RAIIAtenTensorHandle(handle);
                break;
            }
            case 1: {  // slice
                const int64_t source = at[0], value = at[1], dims = at[2], offset = at[3];
                AtenTensorHandle view;
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(values[source], dims, at + 4, at + 4 + dims, offset, &view));
                values[value] = RAIIAtenTensorHandle(view);
                at += 4 + 2 * dims;
                break;
            }
            default:  // drop
                values[*at++].reset();
        }
    }
}

}  // namespace pyrolvm

void inductor_entry_impl(AtenTensorHandle* inputs, AtenTensorHandle*) {
    py::gil_scoped_release_simple release;
    pyrolvm::Values values(NUM_VALUES);
    for (int i = 0; i < NUM_INPUTS; ++i) values[i] = RAIIAtenTensorHandle(inputs[i]);
    std::vector<AtenTensorHandle> given, made;
    pyrolvm::set_numbers(values);
    pyrolvm::interpret<false>(pyrolvm::once, values, given, made);
    for (int64_t left = pyrolvm::num_steps; left > 0; --left) {
        if (left == pyrolvm::num_steps) {
            pyrolvm::interpret<true>(pyrolvm::each, values, given, made);
        } else {
            pyrolvm::interpret<false>(pyrolvm::each, values, given, made);
        }
    }
}
