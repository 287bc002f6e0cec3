// The sum of an array over the processes of one machine, through memory that they share: see memory.py. `run` gives
// all of it to all; `scatter` gives each process its share, and `gather` gives all shares to all.
//
// The memory has a line for each process, which says how far it has come, and slots for parts of the array:
//
//     [lines: 128 bytes of each process][slots: 2 of each process]
//
// A part goes in three steps: each process writes its own to its slot, all wait for all, each adds up the slots in the
// order of the ranks, so that all have the same bits. Of many processes each adds up its share alone and leaves it in
// its slot for the others. Slots are used in turn: who writes to one has seen that all have read what was in it.

#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace pyrolvm {

struct Place {  // as memory.py writes it
    int64_t rank, count, slot_bytes, file, patience_ms;
};

// Arrays in a row, as if they were one.
template <typename T>
struct Parts {
    std::vector<T*> data;
    std::vector<int64_t> begin{0};  // and the end of all

    void add(void* array, int64_t length) {
        data.push_back(static_cast<T*>(array));
        begin.push_back(begin.back() + length);
    }

    // `what(array, at, number)` of what lies within `length` entries from `first` on, `at` counted from there.
    template <typename What>
    void each(int64_t first, int64_t length, const What& what) const {
        for (size_t i = std::upper_bound(begin.begin(), begin.end(), first) - begin.begin() - 1; i < data.size() && begin[i] < first + length; ++i) {
            const int64_t from = std::max(first, begin[i]), to = std::min(first + length, begin[i + 1]);
            if (from < to) what(data[i] + (from - begin[i]), from - first, to - from);
        }
    }
};

class SharedSum {
   public:
    SharedSum(void* memory, const void* place) : memory_(static_cast<char*>(memory)), at_(*static_cast<const Place*>(place)) {}

    template <typename T>
    void run(const T* value, T* sum, int64_t length) const {
        const int64_t most = at_.slot_bytes / sizeof(T);
        for (int64_t begin = 0; begin < length; begin += most) {
            part(value + begin, sum + begin, std::min(most, length - begin));
        }
    }

    // The sum of this process's share, of `length`, of `value` times `scale`; 0 where that has ended.
    template <typename T>
    void scatter(const Parts<const T>& value, T scale, T* sum, int64_t length) const {
        const int64_t most = at_.slot_bytes / sizeof(T) / (at_.count - 1);
        for (int64_t begin = 0; begin < length; begin += most) {
            scatter_part(value, scale, sum + begin, begin, std::min(most, length - begin), length, most);
        }
        const int64_t last = std::clamp<int64_t>(value.begin.back() - at_.rank * length, 0, length);
        std::fill(sum + last, sum + length, T(0));
    }

    // All shares of `length` each, from each process's own.
    template <typename T>
    void gather(const T* own, const Parts<T>& all, int64_t length) const {
        const int64_t most = at_.slot_bytes / sizeof(T);
        for (int64_t begin = 0; begin < length; begin += most) {
            gather_part(own + begin, all, begin, std::min(most, length - begin), length);
        }
    }

   private:
    static constexpr int64_t LINE = 128, FEW = 3, SMALL = 4096, LEAST_SPINS = 1000, MOST_SPINS = 20000;

    template <typename T>
    void part(const T* value, T* sum, int64_t length) const {
        const uint32_t before = line(at_.rank).step.load(std::memory_order_relaxed);
        const bool second = before >> 1 & 1;
        T* own = slot<T>(second, at_.rank);
        std::memcpy(own, value, length * sizeof(T));
        if (at_.count <= FEW || length < SMALL) {
            meet(before + 2);
            add(second, 0, length, value, sum);
            return;
        }
        meet(before + 1);
        const int64_t begin = share(at_.rank, length), end = share(at_.rank + 1, length);
        add(second, begin, end, value, sum);
        std::memcpy(own + begin, sum + begin, (end - begin) * sizeof(T));
        meet(before + 2);
        for (int64_t rank = 0; rank < at_.count; ++rank) {
            if (rank == at_.rank) continue;
            const int64_t from = share(rank, length), to = share(rank + 1, length);
            std::memcpy(sum + from, slot<T>(second, rank) + from, (to - from) * sizeof(T));
        }
    }

    // `length` entries of each share, from `begin` on; shares lie `apart`. A slot has `most` for each of the others.
    template <typename T>
    void scatter_part(const Parts<const T>& value, T scale, T* sum, int64_t begin, int64_t length, int64_t apart, int64_t most) const {
        const uint32_t before = line(at_.rank).step.load(std::memory_order_relaxed);
        const bool second = before >> 1 & 1;
        for (int64_t rank = 0; rank < at_.count; ++rank) {
            if (rank == at_.rank) continue;
            T* to = slot<T>(second, at_.rank) + most * (rank - (rank > at_.rank));
            value.each(rank * apart + begin, length, [&](const T* from, int64_t at, int64_t number) { scaled(from, scale, to + at, number); });
        }
        meet(before + 2);
        value.each(at_.rank * apart + begin, length, [&](const T* own, int64_t at, int64_t number) {
            const auto of = [&](int64_t rank) { return rank == at_.rank ? own : slot<T>(second, rank) + most * (at_.rank - (at_.rank > rank)) + at; };
            const auto times = [&](int64_t rank) { return rank == at_.rank ? scale : T(1); };
            add_scaled(of(0), times(0), of(1), times(1), sum + at, number);
            for (int64_t rank = 2; rank < at_.count; ++rank) add_scaled(sum + at, T(1), of(rank), times(rank), sum + at, number);
        });
    }

    template <typename T>
    void gather_part(const T* own, const Parts<T>& all, int64_t begin, int64_t length, int64_t apart) const {
        const uint32_t before = line(at_.rank).step.load(std::memory_order_relaxed);
        const bool second = before >> 1 & 1;
        std::memcpy(slot<T>(second, at_.rank), own, length * sizeof(T));
        for (int64_t turn = 0; turn < at_.count; ++turn) {
            const int64_t rank = (at_.rank + turn) % at_.count;
            if (turn == 1) meet(before + 2);
            const T* from = turn == 0 ? own : slot<T>(second, rank);
            all.each(rank * apart + begin, length, [&](T* to, int64_t at, int64_t number) { std::memcpy(to, from + at, number * sizeof(T)); });
        }
    }

    template <typename T>
    void add(bool second, int64_t begin, int64_t end, const T* value, T* __restrict sum) const {
        const auto of = [&](int64_t rank) { return rank == at_.rank ? value : slot<T>(second, rank); };
        const T *first = of(0), *other = of(1);
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) sum[i] = first[i] + other[i];
        for (int64_t rank = 2; rank < at_.count; ++rank) {
            const T* next = of(rank);
#pragma omp simd
            for (int64_t i = begin; i < end; ++i) sum[i] += next[i];
        }
    }

    template <typename T>
    static void scaled(const T* __restrict from, T scale, T* __restrict to, int64_t number) {
#pragma omp simd
        for (int64_t i = 0; i < number; ++i) to[i] = scale * from[i];
    }

    template <typename T>
    static void add_scaled(const T* first, T once, const T* second, T twice, T* to, int64_t number) {
#pragma omp simd
        for (int64_t i = 0; i < number; ++i) to[i] = once * first[i] + twice * second[i];
    }

    int64_t share(int64_t rank, int64_t length) const { return length * rank / at_.count; }

    struct Line {
        std::atomic<uint32_t> step, sleepers;  // how far it has come, and how many sleep until it comes further
        int64_t spins;                         // before it sleeps itself
    };

    Line& line(int64_t rank) const { return *reinterpret_cast<Line*>(memory_ + LINE * rank); }

    bool has_come(int64_t rank, uint32_t step) const {
        return static_cast<int32_t>(line(rank).step.load(std::memory_order_acquire) - step) >= 0;
    }

    template <typename T>
    T* slot(bool second, int64_t rank) const {
        return reinterpret_cast<T*>(memory_ + LINE * at_.count + (second * at_.count + rank) * at_.slot_bytes);
    }

    // Say that this process has come so far, and wait until all have.
    void meet(uint32_t step) const {
        Line& own = line(at_.rank);
        own.step.store(step);
        if (own.sleepers.load() > 0) futex(own, FUTEX_WAKE, INT_MAX, nullptr);
        for (int64_t rank = 0; rank < at_.count; ++rank) wait(rank, step);
    }

    // Spinning (some 50 ns each) is quick where every process has a core. Where they have not, one that sleeps leaves its
    // core to the others, and is woken sooner than one that yields: who has spun in vain spins less the next time.
    void wait(int64_t rank, uint32_t step) const {
        int64_t& spins = line(at_.rank).spins;
        for (int64_t tries = 0; tries < std::max(spins, LEAST_SPINS); ++tries) {
            if (has_come(rank, step)) {
                if (tries > 0) spins = std::clamp(2 * spins, LEAST_SPINS, MOST_SPINS);
                return;
            }
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        spins /= 4;
        Line& other = line(rank);
        const int64_t since = milliseconds();
        const timespec nap{0, 200000000};
        while (!has_come(rank, step)) {
            ++other.sleepers;
            const uint32_t seen = other.step.load();
            if (!has_come(rank, step)) futex(other, FUTEX_WAIT, seen, &nap);
            --other.sleepers;
            // looked at once more: it may have come here and ended since
            if (is_gone(rank) && !has_come(rank, step)) {
                throw std::runtime_error("a process of the shared memory has ended: connection lost");
            }
            if (milliseconds() - since > at_.patience_ms && !has_come(rank, step)) {
                throw std::runtime_error("a process of the shared memory does not come: timed out");
            }
        }
    }

    static void futex(Line& line, int what, uint32_t value, const timespec* nap) {
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&line.step), what, value, nap, nullptr, 0);
    }

    // Every process locks a byte of the file, which the system frees when it ends.
    bool is_gone(int64_t rank) const {
        struct flock lock {};
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = rank;
        lock.l_len = 1;
        return fcntl(static_cast<int>(at_.file), F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
    }

    static int64_t milliseconds() {
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000 + now.tv_nsec / 1000000;
    }

    char* memory_;
    Place at_;
};

// `with` the type of number `kind`, its place in memory.py's table.
template <typename With>
static void of_kind(int64_t kind, const With& with) {
    switch (kind) {
        case 0: return with(float{});
        case 1: return with(double{});
        case 2: return with(int64_t{});
        default: return with(uint8_t{});
    }
}

static void shared_sum(void* memory, const void* place, const void* value, void* sum, int64_t length, int64_t kind) {
    of_kind(kind, [&](auto example) {
        using T = decltype(example);
        SharedSum(memory, place).run(static_cast<const T*>(value), static_cast<T*>(sum), length);
    });
}

// An array among several, and its length.
struct Array {
    void* data;
    int64_t length;
};

template <typename T>
static Parts<T> parts(const Array* arrays, int64_t number) {
    Parts<T> found;
    for (int64_t i = 0; i < number; ++i) found.add(arrays[i].data, arrays[i].length);
    return found;
}

// The own share of the sum of `values`, and after it the sum of `rest`, which all get.
static void shared_scatter(void* memory, const void* place, const Array* values, int64_t number, double scale, Array rest, void* sum, int64_t length, int64_t kind) {
    of_kind(kind, [&](auto example) {
        using T = decltype(example);
        const SharedSum over(memory, place);
        over.scatter(parts<const T>(values, number), static_cast<T>(scale), static_cast<T*>(sum), length);
        over.run(static_cast<const T*>(rest.data), static_cast<T*>(sum) + length, rest.length);
    });
}

static void shared_gather(void* memory, const void* place, const void* share, int64_t length, const Array* into, int64_t number, int64_t kind) {
    of_kind(kind, [&](auto example) {
        using T = decltype(example);
        SharedSum(memory, place).gather(static_cast<const T*>(share), parts<T>(into, number), length);
    });
}

}  // namespace pyrolvm
