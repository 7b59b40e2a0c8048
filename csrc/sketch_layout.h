// Where the numbers of a sketch stand: said here for C++, in grace_kernels/sketch_layout.py for
// Python, which says what they mean.
#pragma once

namespace grace {

constexpr int kDirections = 64;  // and as many coordinates
constexpr int kHead = 8;         // coordinates in the head
constexpr int kBlockSlots = 32;  // whose codes for one number are neighbours
constexpr int kOutliers = 32;    // slots whose radii may exceed radius_bound
constexpr int kUnknown = 127;    // code of an error that has no bound
constexpr int kCounters = 4;     // queries, pairs, scored, scanned

// The order of the codes of a slot, and of the scales.
constexpr int kResidual = 0, kError = 1, kCoordinates = 2;
constexpr int kHeadNumbers = kCoordinates + kHead;
constexpr int kTailNumbers = kDirections - kHead;
constexpr int kMiddle = kCoordinates + kDirections;  // what is to be added to every residual
constexpr int kScales = kMiddle + 1;

// Of a block.
constexpr int kHeadBytes = kHeadNumbers * kBlockSlots;
constexpr int kTailBytes = kTailNumbers * kBlockSlots;

}  // namespace grace
