// The loop over the steps that inductor wrote one of.
//
// Before it: inductor's own headers, and NUM_INPUTS, STEPS_PER_CALL (see native.py).

namespace pyrolvm {

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
