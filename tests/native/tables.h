// Tables of rotary positions for a case of attention, and what they do to a row, in double.
#pragma once

#include "../../csrc/cpu/isa.h"
#include "fence.h"

namespace fuzz {

struct Tables {
  Elements sin, cos;
  deit::Rope rope{};
  int64_t dim;

  // Without tables where `wanted` is false. Rows may be longer than a head; heads may share them.
  Tables(bool wanted, int64_t tokens, int64_t heads, int64_t head_dim, Random& random)
      : Tables(wanted ? random.between(0, tokens - 1) : tokens, random.chance(0.5), tokens, heads,
               head_dim, head_dim + (random.chance(0.5) ? random.size(20) : 0), random) {}

  // Channel i of a row x of a head and a token.
  template <class Row>
  double turned(int64_t head, int64_t token, int64_t i, const Row& x) const {
    if (!rope.sin || token < rope.prefix) return x(i);
    const int64_t at = row(head, token);
    const double other = first(i) ? -x(partner(i)) : x(partner(i));
    return x(i) * static_cast<double>(rope.cos[at + i]) +
           other * static_cast<double>(rope.sin[at + i]);
  }

  // Channel i of the gradient of x from that of what `turned` makes of it.
  double turned_back(int64_t head, int64_t token, int64_t i, const std::vector<double>& dy) const {
    const double own = dy[static_cast<size_t>(i)];
    if (!rope.sin || token < rope.prefix) return own;
    const int64_t at = row(head, token), j = partner(i);
    const double other = dy[static_cast<size_t>(j)] * static_cast<double>(rope.sin[at + j]);
    return own * static_cast<double>(rope.cos[at + i]) + (first(i) ? other : -other);
  }

 private:
  Tables(int64_t prefix, bool by_head, int64_t tokens, int64_t heads, int64_t head_dim,
         int64_t stride, Random& random)
      : Tables(prefix, (tokens - prefix) * (by_head ? heads : 1), head_dim, stride, random) {
    if (rope.sin && by_head) rope.stride_head = (tokens - prefix) * stride;
  }

  // The gaps between rows stay NaN: what reads them shows.
  Tables(int64_t prefix, int64_t rows, int64_t head_dim, int64_t stride, Random& random)
      : sin(rows ? (rows - 1) * stride + head_dim : 0, deit::Scalar::f32, random),
        cos(rows ? (rows - 1) * stride + head_dim : 0, deit::Scalar::f32, random),
        dim(head_dim) {
    if (rows == 0) return;
    for (int64_t i = 0; i < rows * head_dim; ++i) {
      for (Elements* table : {&sin, &cos}) {
        table->set(i / head_dim * stride + i % head_dim,
                   static_cast<float>(random.between(-64, 64)) / 64.0f);
      }
    }
    rope = {sin.memory.floats(), cos.memory.floats(), 0, stride, prefix, random.chance(0.5)};
  }

  int64_t row(int64_t head, int64_t token) const {
    return head * rope.stride_head + (token - rope.prefix) * rope.stride_token;
  }
  bool first(int64_t i) const { return rope.interleaved ? i % 2 == 0 : i < dim / 2; }
  int64_t partner(int64_t i) const {
    if (rope.interleaved) return i ^ 1;
    return first(i) ? i + dim / 2 : i - dim / 2;
  }
};

}  // namespace fuzz
