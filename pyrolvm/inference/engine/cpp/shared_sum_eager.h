// The operators of memory.py for Python, after shared_sum.h. They return what went wrong, or null.

template <typename What>
static const char* attempted(const What& what) {
    static thread_local std::string error;
    try {
        what();
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

extern "C" const char* pyrolvm_shared_sum(void* memory, const void* place, const void* value, void* sum, int64_t length, int64_t kind) {
    return attempted([&] { pyrolvm::shared_sum(memory, place, value, sum, length, kind); });
}

extern "C" const char* pyrolvm_shared_scatter(void* memory, const void* place, const pyrolvm::Array* values, int64_t number, double scale, void* rest, int64_t rest_length, void* sum, int64_t length, int64_t kind) {
    return attempted([&] { pyrolvm::shared_scatter(memory, place, values, number, scale, {rest, rest_length}, sum, length, kind); });
}

extern "C" const char* pyrolvm_shared_gather(void* memory, const void* place, const void* share, int64_t length, const pyrolvm::Array* into, int64_t number, int64_t kind) {
    return attempted([&] { pyrolvm::shared_gather(memory, place, share, length, into, number, kind); });
}
