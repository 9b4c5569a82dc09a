// The Jacobian of softmax applied to small rows.
#pragma once

#include <cstdint>

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"
#include "ffi/kernels/compensated_lanes.h"
#include "ffi/kernels/jacobian.h"
#include "ffi/kernels/small_tile.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public function does.
template <typename V, typename E>
class SmallJacobianKernels {
  using T = typename V::Scalar;
  using Tile = SmallTile<V>;
  using Row = JacobianKernels<V, E>;

 public:
  // From so many elements on, a row's own sum costs less than transpositions.
  static constexpr int kLongRow = 2 * V::kLanes;

  static void Write(const E* y, const E* t, E* out, std::int64_t rows, int n) {
    if (n >= kLongRow) {
      for (const E* const end = y + rows * n; y != end; y += n, t += n, out += n) {
        Row::Write(y, t, out, n, Rounded<T>(Row::Dot(y, t, n)), false);
      }
      return;
    }
    for (std::int64_t first = 0; first < rows; first += V::kLanes) {
      WriteTile(y + first * n, t + first * n, out + first * n, rows - first, n);
    }
  }

 private:
  // The first rows of `rest`, as many as there are lanes.
  static SOFTMAX2P_INLINE void WriteTile(const E* y, const E* t, E* out, std::int64_t rest, int n) {
    const V zero = V::Broadcast(0);
    T of_y[kMaxSmall * V::kLanes], of_t[kMaxSmall * V::kLanes];
    Tile::Load(y, rest, n, of_y);
    Tile::Load(t, rest, n, of_t);
    CompensatedLanes<V> dot;
    for (int i = 0; i < n * V::kLanes; i += V::kLanes) {
      V error;
      const V product = TwoProd(V::Load(of_y + i), V::Load(of_t + i), error);
      dot.Add(product, error);
    }
    V lo;
    const V hi = FastTwoSum(dot.sum, dot.rest, lo);
    // As Rounded of a row.
    const V finite = FiniteOr0(lo), sum = WhereEqual(lo - lo, zero, hi, dot.sum);
    for (int i = 0; i < n * V::kLanes; i += V::kLanes) {
      (V::Load(of_y + i) * ((V::Load(of_t + i) - sum) - finite)).Store(of_t + i);
    }
    Tile::Store(of_t, Tile::RowsOf(rest), n, out, false);
  }
};

}  // namespace jax_softmax2p
