// Packed sequences: sequence s owns the rows starts[s] .. starts[s + 1] of b sequences.

// The sequence of a packed row. With one row a sequence, as in decoding, the first guess is right.
template <typename I> DEVICE int sequence_of(const I *starts, int b, int row) {
    if (row < b && (int)starts[row] == row && (int)starts[row + 1] == row + 1) return row;
    int low = 0, high = b - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if ((int)starts[middle + 1] > row) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// Each sequence's rows are cut into tiles of ROWS; finds sequence and tile of a number counted over all sequences, with
// a whole warp. False beyond the last tile.
template <int ROWS, typename I> DEVICE bool tile_of(const I *starts, int b, int number, int &sequence, int &tile) {
    const int lane = threadIdx.x % 32;
    for (int base = 0; base < b; base += 32) {
        const int s = base + lane;
        const int own = s < b ? ((int)starts[s + 1] - (int)starts[s] + ROWS - 1) / ROWS : 0;
        int sum = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, sum, step);
            if (lane >= step) sum += other;
        }
        const u32 beyond = __ballot_sync(0xffffffffu, sum > number);
        if (beyond != 0) {
            const int winner = __ffs(beyond) - 1;
            sequence = base + winner;
            tile = number - __shfl_sync(0xffffffffu, sum - own, winner);
            return true;
        }
        number -= __shfl_sync(0xffffffffu, sum, 31);
    }
    return false;
}
