// `shared_sum` for Python, after shared_sum.h. Returns what went wrong, or null.
extern "C" const char* pyrolvm_shared_sum(void* memory, const void* place, const void* value, void* sum, int64_t length, int64_t kind) {
    static thread_local std::string error;
    try {
        pyrolvm::shared_sum(memory, place, value, sum, length, kind);
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}
