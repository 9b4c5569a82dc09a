// The products of packed panels of which attention is made: the micro-kernel, and how its operands are
// packed.
//
// C[rows][columns] = A·B. B is a panel of one to kVectors vectors of columns, contiguous: B[depth][columns].
// A is read one element at a time, each for all columns: element (i, d) is a[d * stride + i]. All of a tile
// of C, kRows by kVectors vectors, is in registers, so that each step of the depth loads kRows elements and
// kVectors vectors for kRows·kVectors multiply-adds. That keeps two multiply-adds a cycle busy, where the
// panels are in the first-level cache.
//
// Source: K. Goto & R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3),
// 2008.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"

namespace jax_softmax2p {

template <typename V>
class Gemm {
  using T = typename V::Scalar;

 public:
  // With 32 registers 24 hold the tile, with 16 of them 12; the others hold what is multiplied.
  static constexpr int kRows = V::kRegisters >= 32 ? 8 : 4;
  static constexpr int kVectors = 3;
  static constexpr int kColumns = kVectors * V::kLanes;
  // The rows of A that Pack puts side by side: the tiles of kRows of them have this stride.
  static constexpr int kPackedRows = V::kLanes > kRows ? V::kLanes : kRows;

  // A tile of C, in registers.
  template <int vectors>
  struct Tile {
    V c[kRows][vectors];

    SOFTMAX2P_INLINE void Clear() {
      SOFTMAX2P_UNROLL for (int i = 0; i < kRows; ++i) {
        SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) c[i][v] = V::Broadcast(0);
      }
    }
    // Adds the tile to C, whose rows are `stride` apart. A product that is summed from 0 and then added has a
    // rounding error that grows with the number of products, and not with the whole depth.
    SOFTMAX2P_INLINE void AddTo(T* to, std::int64_t stride = vectors * V::kLanes) const {
      SOFTMAX2P_UNROLL for (int i = 0; i < kRows; ++i) {
        SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
          T* const at = to + i * stride + v * V::kLanes;
          (V::Load(at) + c[i][v]).Store(at);
        }
      }
    }
    SOFTMAX2P_INLINE void AddProduct(const T* a, std::int64_t stride, const T* b, std::int64_t depth) {
      for (std::int64_t d = 0; d < depth; ++d) {
        V b_d[vectors];
        SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) b_d[v] = V::Load(b + v * V::kLanes);
        SOFTMAX2P_UNROLL for (int i = 0; i < kRows; ++i) {
          const V a_i = V::Broadcast(a[i]);
          SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) c[i][v] = Fma(a_i, b_d[v], c[i][v]);
        }
        a += stride;
        b += vectors * V::kLanes;
      }
    }
    // The same for A that lies row by row, element (i, d) at a[i * width + d], and a stride of B.
    template <int width>
    SOFTMAX2P_INLINE void AddProductOfRows(const T* a, const T* b, std::int64_t b_stride,
                                           std::int64_t depth) {
      for (std::int64_t d = 0; d < depth; ++d, b += b_stride) {
        V b_d[vectors];
        SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) b_d[v] = V::Load(b + v * V::kLanes);
        SOFTMAX2P_UNROLL for (int i = 0; i < kRows; ++i) {
          const V a_i = V::Broadcast(a[i * width + d]);
          SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) c[i][v] = Fma(a_i, b_d[v], c[i][v]);
        }
      }
    }
  };

  // c[rows][columns] += A·B for any number of rows that is a multiple of kRows: row i of A begins at
  // a[i / kRows * tile_stride].
  template <int vectors>
  static void Accumulate(const T* a, std::int64_t tile_stride, std::int64_t stride, const T* b,
                         std::int64_t rows, std::int64_t depth, T* c) {
    for (std::int64_t i = 0; i < rows; i += kRows) {
      Tile<vectors> tile;
      tile.Clear();
      tile.AddProduct(a, stride, b, depth);
      tile.AddTo(c);
      a += tile_stride;
      c += kRows * vectors * V::kLanes;
    }
  }

  // Where the tile of A of row i begins, after Pack.
  static SOFTMAX2P_INLINE const T* PackedTile(const T* packed, std::int64_t i, std::int64_t depth) {
    return packed + i / kPackedRows * kPackedRows * depth + i % kPackedRows;
  }

  // Transposes rows x[rows][depth], `stride` apart, into panels of `columns` of them side by side: element
  // (i, d) at packed[(i / columns * depth + d) * columns + i % columns]. rows must be a multiple of kLanes,
  // columns, too, and depth of kTransposeRows.
  static void Pack(const T* x, std::int64_t stride, std::int64_t rows, std::int64_t depth,
                   std::int64_t columns, T* packed) {
    constexpr int kStep = V::kTransposeRows;
    for (std::int64_t i = 0; i < rows; i += V::kLanes) {
      T* to = packed + i / columns * columns * depth + i % columns;
      for (std::int64_t d = 0; d < depth; d += kStep) {
        V transposed[kStep];
        V::LoadTransposed(x + i * stride + d, stride, transposed);
        SOFTMAX2P_UNROLL for (int s = 0; s < kStep; ++s) transposed[s].Store(to + (d + s) * columns);
      }
    }
  }

  // The inverse of Pack of one panel.
  static void Unpack(const T* packed, std::int64_t rows, std::int64_t depth, std::int64_t columns, T* x,
                     std::int64_t stride) {
    constexpr int kStep = V::kTransposeRows;
    for (std::int64_t i = 0; i < rows; i += V::kLanes) {
      for (std::int64_t d = 0; d < depth; d += kStep) {
        V transposed[kStep];
        SOFTMAX2P_UNROLL for (int s = 0; s < kStep; ++s) {
          transposed[s] = V::Load(packed + (d + s) * columns + i);
        }
        V::StoreTransposed(transposed, x + i * stride + d, stride);
      }
    }
  }

  // out[rows][columns] = A·B of contiguous arrays of any size, in panels as attention has them: for tests and
  // measurement. `scratch` has ProductScratch elements.
  static void Product(const T* a, const T* b, std::int64_t rows, std::int64_t depth, std::int64_t columns,
                      T* out, T* scratch) {
    const std::int64_t packed_rows = RoundUp(rows, kPackedRows), packed_depth = RoundUp(depth, kTranspose);
    T *const packed = scratch, *const padded = packed + packed_rows * packed_depth,
             *const panel = padded + packed_rows * packed_depth, *const c = panel + packed_depth * kColumns;
    for (std::int64_t i = 0; i < packed_rows * packed_depth; ++i) padded[i] = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t d = 0; d < depth; ++d) padded[i * packed_depth + d] = a[i * depth + d];
    }
    Pack(padded, packed_depth, packed_rows, packed_depth, kPackedRows, packed);
    for (std::int64_t j = 0; j < columns;) {
      const std::int64_t left = columns - j;
      const std::int64_t vectors = left > 2 * V::kLanes ? 3 : left > V::kLanes ? 2 : 1;
      const std::int64_t width = vectors * V::kLanes, used = left < width ? left : width;
      for (std::int64_t d = 0; d < depth; ++d) {
        for (std::int64_t k = 0; k < width; ++k) panel[d * width + k] = k < used ? b[d * columns + j + k] : 0;
      }
      for (std::int64_t i = 0; i < packed_rows; i += kRows) {
        for (std::int64_t k = 0; k < kRows * width; ++k) c[k] = 0;
        WithVectors(vectors, [&](auto count) {
          Accumulate<count.value>(PackedTile(packed, i, packed_depth), 0, kPackedRows, panel, kRows, depth,
                                  c);
        });
        for (std::int64_t r = 0; r < kRows && i + r < rows; ++r) {
          for (std::int64_t k = 0; k < used; ++k) out[(i + r) * columns + j + k] = c[r * width + k];
        }
      }
      j += used;
    }
  }
  static std::int64_t ProductScratch(std::int64_t rows, std::int64_t depth) {
    const std::int64_t packed_depth = RoundUp(depth, kTranspose);
    return 2 * RoundUp(rows, kPackedRows) * packed_depth + (packed_depth + kRows) * kColumns;
  }

  // How many vectors the next panel takes of those that are left. A last panel of a single vector would be
  // slow: the last two share theirs.
  static SOFTMAX2P_INLINE int VectorsOfPanel(std::int64_t left) {
    return static_cast<int>(left == 4 ? 2 : left < kVectors ? left : kVectors);
  }

  // Calls body(an integral constant) for a number of vectors from 1 to kVectors.
  template <typename Body>
  static SOFTMAX2P_INLINE void WithVectors(std::int64_t vectors, const Body& body) {
    switch (vectors) {
      case 1:
        return body(std::integral_constant<int, 1>{});
      case 2:
        return body(std::integral_constant<int, 2>{});
      default:
        return body(std::integral_constant<int, kVectors>{});
    }
  }

  static constexpr int kTranspose = V::kTransposeRows;
  // Sizes that are multiples of it are packed, and computed in whole tiles.
  static constexpr int kAlign = kRows > kTranspose ? kRows : kTranspose;
};

}  // namespace jax_softmax2p
