// torch's allocator of host memory with a pool of large blocks (block_pool.py says why).
//
// A block that is freed stays mapped and is used again for the next one of about its size. All
// blocks of the pool together, in use or not, stay within a limit: room for a new one is made of
// those that were freed longest ago. What is in use may pass the limit; then nothing stays. Small
// blocks are left to the allocator that was there before.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <pthread.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr std::size_t kPageBytes = 4096;

// Smaller blocks are too many to be mapped one by one.
constexpr std::size_t kPooledFromBytes = std::size_t{1} << 20;

// A block may be used for one that is smaller by this share of it.
constexpr std::size_t kWastedShare = 8;

struct FreeBlock {
  void* place;
  std::size_t size;
};

class BlockPool final : public c10::Allocator {
 public:
  static BlockPool& instance() {
    // Never destroyed: tensors may outlive every static object.
    static auto* pool = new BlockPool();
    return *pool;
  }

  c10::DataPtr allocate(std::size_t num_bytes) override {
    void* place = num_bytes < kPooledFromBytes ? before_->raw_allocate(num_bytes) : take(num_bytes);
    return {place, place, &BlockPool::release, c10::Device(c10::DeviceType::CPU)};
  }

  // Of all blocks, as torch wants it of an allocator that oneDNN shall use too.
  c10::DeleterFnPtr raw_deleter() const override {
    return &BlockPool::release;
  }

  void copy_data(void* target, const void* source, std::size_t count) const override {
    default_copy_data(target, source, count);
  }

  void set_limit(std::size_t limit) {
    const std::lock_guard<std::mutex> guard(mutex_);
    limit_ = limit;
    make_room(0);
  }

  std::uint64_t mapped() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return mapped_;
  }

  std::uint64_t mappings() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return mappings_;
  }

 private:
  BlockPool() : before_(c10::GetCPUAllocator()) {
    // A child of fork() has only the thread that forked: no other may hold the lock in it.
    pthread_atfork(
        [] { instance().mutex_.lock(); },
        [] { instance().mutex_.unlock(); },
        [] { instance().mutex_.unlock(); });
    c10::SetCPUAllocator(this);
  }

  static void release(void* place) {
    auto& pool = instance();
    // Blocks of the pool begin with a page; of the others, few do.
    const bool may_be_pooled = reinterpret_cast<std::uintptr_t>(place) % kPageBytes == 0;
    if (!may_be_pooled || !pool.give_back(place)) {
      pool.before_->raw_deallocate(place);
    }
  }

  void* take(std::size_t num_bytes) {
    const std::size_t size = (num_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto fitting = by_size_.lower_bound(size);
    if (fitting != by_size_.end() && fitting->first - size <= fitting->first / kWastedShare) {
      const FreeBlock block = *fitting->second;
      oldest_first_.erase(fitting->second);
      by_size_.erase(fitting);
      in_use_[block.place] = block.size;
      return block.place;
    }
    make_room(size);
    void* place = map(size);
    if (place == MAP_FAILED) {
      drop_all();
      place = map(size);
    }
    TORCH_CHECK_WITH(
        OutOfMemoryError,
        place != MAP_FAILED,
        "not enough host memory: you tried to allocate ",
        num_bytes,
        " bytes.");
    mapped_ += size;
    ++mappings_;
    in_use_[place] = size;
    return place;
  }

  // False where it is not a block of the pool.
  bool give_back(void* place) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = in_use_.find(place);
    if (found == in_use_.end()) {
      return false;
    }
    const FreeBlock block{place, found->second};
    in_use_.erase(found);
    if (mapped_ > limit_) {
      unmap(block);
      return true;
    }
    // The one freed last is the first to be used again: it may be in the processor's cache.
    const auto age = oldest_first_.insert(oldest_first_.end(), block);
    by_size_.insert(by_size_.lower_bound(block.size), {block.size, age});
    return true;
  }

  // Frees what was freed longest ago, as far as needed for `size` more bytes within the limit.
  void make_room(std::size_t size) {
    while (!oldest_first_.empty() && mapped_ + size > limit_) {
      drop_oldest();
    }
  }

  void drop_all() {
    while (!oldest_first_.empty()) {
      drop_oldest();
    }
  }

  void drop_oldest() {
    const auto oldest = oldest_first_.begin();
    auto named = by_size_.lower_bound(oldest->size);
    while (named->second != oldest) {
      ++named;
    }
    by_size_.erase(named);
    unmap(*oldest);
    oldest_first_.erase(oldest);
  }

  static void* map(std::size_t size) {
    return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }

  void unmap(const FreeBlock& block) {
    munmap(block.place, block.size);
    mapped_ -= block.size;
  }

  c10::Allocator* before_;
  std::mutex mutex_;
  std::size_t limit_ = 0;
  std::size_t mapped_ = 0;
  std::uint64_t mappings_ = 0;
  std::unordered_map<void*, std::size_t> in_use_;
  std::list<FreeBlock> oldest_first_;
  std::multimap<std::size_t, std::list<FreeBlock>::iterator> by_size_;
};

}  // namespace

extern "C" {

// From now on torch's host memory comes from the pool; the limit is of all its blocks together.
void openwafer_block_pool_limit(std::uint64_t limit_bytes) {
  BlockPool::instance().set_limit(limit_bytes);
}

// Bytes of all blocks, in use or not.
std::uint64_t openwafer_block_pool_mapped() {
  return BlockPool::instance().mapped();
}

// Blocks that were mapped so far.
std::uint64_t openwafer_block_pool_mappings() {
  return BlockPool::instance().mappings();
}
}
