// One instruction set's table of lanes.h. Compiled once per set, with its flags and
// DEIT_ISA=<its name>, so nothing but simd.h may be included, as in csrc/cpu/kernels.cpp.
#include "lanes.h"

#include "../../csrc/cpu/simd.h"

#define DEIT_TABLE_NAME(isa) isa##_lanes
#define DEIT_TABLE(isa) DEIT_TABLE_NAME(isa)
#define DEIT_TEXT_OF(isa) #isa
#define DEIT_TEXT(isa) DEIT_TEXT_OF(isa)

namespace fuzz {
namespace {

using namespace deit::DEIT_ISA;

Vec result(Op op, Vec a, Vec b, Vec c) {
  switch (op) {
    case Op::max: return deit::DEIT_ISA::max(a, b);
    case Op::min: return deit::DEIT_ISA::min(a, b);
    case Op::fma: return deit::DEIT_ISA::fma(a, b, c);
    case Op::round: return deit::DEIT_ISA::round(a);
    case Op::scale_by_power: return scale_by_power(a, b);
    case Op::exp: return exp_nonpositive(a);
    case Op::swap_pairs: return swap_pairs(a);
    case Op::multiply_pairs: return multiply_pairs(a, b, c);
  }
  return a;
}

void apply(Op op, const float* a, const float* b, const float* c, float* to) {
  store(to, result(op, load(a), load(b), load(c)));
}
void first_lanes(const float* a, int n, float* to) { store(to, first(load(a), n)); }
float sum_of(const float* a) { return sum(load(a)); }
float largest_of(const float* a) { return largest(load(a)); }

void transposed(float* square) {
  Vec rows[kWidth];
  for (int i = 0; i < kWidth; ++i) rows[i] = load(square + i * kWidth);
  transpose(rows);
  for (int i = 0; i < kWidth; ++i) store(square + i * kWidth, rows[i]);
}

template <class T>
void widen_as(const uint16_t* from, float* to) {
  T halves[kWidth];
  std::memcpy(halves, from, sizeof halves);
  store(to, load(halves));
}
template <class T>
void narrow_as(const float* from, uint16_t* to) {
  T halves[kWidth];
  store(halves, load(from));
  std::memcpy(to, halves, sizeof halves);
}
template <class T>
void narrow_two_as(const float* from, uint16_t* to) {
  T halves[2 * kWidth];
  store_two(halves, load(from), load(from + kWidth));
  std::memcpy(to, halves, sizeof halves);
}
void widen_lanes(bool bf16, const uint16_t* from, float* to) {
  bf16 ? widen_as<BF16>(from, to) : widen_as<F16>(from, to);
}
void narrow_lanes(bool bf16, const float* from, uint16_t* to) {
  bf16 ? narrow_as<BF16>(from, to) : narrow_as<F16>(from, to);
}
void narrow_two_lanes(bool bf16, const float* from, uint16_t* to) {
  bf16 ? narrow_two_as<BF16>(from, to) : narrow_two_as<F16>(from, to);
}

}  // namespace

const Lanes DEIT_TABLE(DEIT_ISA) = {
    DEIT_TEXT(DEIT_ISA), kWidth,     kFused,      apply,        first_lanes,      sum_of,
    largest_of,          transposed, widen_lanes, narrow_lanes, narrow_two_lanes,
};

}  // namespace fuzz
