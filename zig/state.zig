//! Partial attention of a block of query rows over some tokens, and how partial results merge.
//! Merging is exact in the sense of the running softmax and always done in the order of positions,
//! so that the split of work never shows in the bits. Called by attend.zig.
const std = @import("std");
const softmax = @import("softmax.zig");
const vec = @import("vec.zig");
const exp2 = @import("exp2.zig").exp2;
const F = vec.F;

pub const State = struct {
    /// (row): largest logit, in units of log2
    top: []f32,
    /// (row, 16): sums of weights relative to `top`
    sums: []f32,
    /// (row, dim): weighted values
    outputs: []f32,
    dim: usize,

    /// f32 values that `carve` takes for `rows` rows.
    pub fn floats(rows: usize, dim: usize) usize {
        return std.mem.alignForward(usize, rows, vec.lanes) + rows * vec.lanes + rows * dim;
    }

    /// A state in the front of `memory`, which moves on.
    pub fn carve(memory: *[]align(64) f32, rows: usize, dim: usize) State {
        const all = memory.*[0..floats(rows, dim)];
        memory.* = @alignCast(memory.*[all.len..]);
        const tops = std.mem.alignForward(usize, rows, vec.lanes);
        return .{
            .top = all[0..rows],
            .sums = all[tops..][0 .. rows * vec.lanes],
            .outputs = all[tops + rows * vec.lanes ..],
            .dim = dim,
        };
    }

    pub fn reset(state: State) void {
        @memset(state.top, softmax.hidden);
        @memset(state.sums, 0);
        @memset(state.outputs, 0);
    }

    pub fn row_count(state: State) usize {
        return state.top.len;
    }

    /// The part of the state that belongs to the first `count` rows.
    pub fn first_rows(state: State, count: usize) State {
        return .{
            .top = state.top[0..count],
            .sums = state.sums[0 .. count * vec.lanes],
            .outputs = state.outputs[0 .. count * state.dim],
            .dim = state.dim,
        };
    }

    pub fn take(state: State, other: State) void {
        @memcpy(state.top, other.top);
        @memcpy(state.sums, other.sums);
        @memcpy(state.outputs, other.outputs);
    }

    /// Adds `other`, which covers later positions.
    pub fn merge(state: State, other: State) void {
        for (0..state.row_count()) |r| {
            const top = @max(state.top[r], other.top[r]);
            const mine = exp2(1, .{state.top[r] - top})[0];
            const theirs = exp2(1, .{other.top[r] - top})[0];
            state.top[r] = top;
            add_scaled(
                state.sums[r * vec.lanes ..][0..vec.lanes],
                mine,
                other.sums[r * vec.lanes ..],
                theirs,
            );
            add_scaled(
                state.outputs[r * state.dim ..][0..state.dim],
                mine,
                other.outputs[r * state.dim ..],
                theirs,
            );
        }
    }

    fn add_scaled(target: []f32, mine: f32, source: []const f32, theirs: f32) void {
        var i: usize = 0;
        while (i < target.len) : (i += vec.lanes) {
            const a = vec.load(F, target.ptr + i) * vec.splat(mine);
            vec.store(target.ptr + i, a + vec.load(F, source.ptr + i) * vec.splat(theirs));
        }
    }

    /// Adds a virtual token of logit `logit` (in units of log2) and value zero to row `r`.
    pub fn add_sink(state: State, r: usize, logit: f32) void {
        const top = @max(state.top[r], logit);
        const mine = exp2(1, .{state.top[r] - top})[0];
        const sums = state.sums[r * vec.lanes ..][0..vec.lanes];
        for (sums) |*x| x.* *= mine;
        sums[0] += exp2(1, .{logit - top})[0];
        for (state.outputs[r * state.dim ..][0..state.dim]) |*x| x.* *= mine;
        state.top[r] = top;
    }

    /// Sum of the weights of row `r`.
    pub fn total(state: State, r: usize) f32 {
        return vec.reduce(.add, vec.load(F, state.sums.ptr + r * vec.lanes));
    }

    /// The normalised outputs of row `r`.
    pub fn write(state: State, r: usize, out: []f32) void {
        const sum = state.total(r);
        const inverse = if (sum > 0) 1 / sum else 0;
        const outputs = state.outputs.ptr + r * state.dim;
        // Adding zero turns a negative zero into zero, whichever way it arose.
        var i: usize = 0;
        while (i + vec.lanes <= out.len) : (i += vec.lanes) {
            const x = vec.load(F, outputs + i) * vec.splat(inverse);
            vec.store(out.ptr + i, x + vec.splat(0));
        }
        while (i < out.len) : (i += 1) out[i] = outputs[i] * inverse + 0;
    }

    /// Natural logarithm of the sum of exponentials of row `r`.
    pub fn log_sum_exp(state: State, r: usize) f32 {
        const sum = state.total(r);
        if (sum == 0) return -std.math.inf(f32);
        return @floatCast((@as(f64, state.top[r]) + log2(sum)) * ln_2);
    }
};

const ln_2: f64 = 0.6931471805599453;

/// log2 of a positive normal number, by operations that every target rounds alike.
fn log2(x: f32) f64 {
    const bits: u64 = @bitCast(@as(f64, x));
    var exponent = @as(i64, @intCast(bits >> 52)) - 1023;
    var mantissa: f64 = @bitCast((bits & ((1 << 52) - 1)) | (1023 << 52));
    if (mantissa > std.math.sqrt2) {
        mantissa *= 0.5;
        exponent += 1;
    }
    // log(m) = 2 artanh(y), |y| < 0.172
    const y = (mantissa - 1) / (mantissa + 1);
    const square = y * y;
    var series: f64 = 0;
    inline for (0..12) |k| series = series * square + 1.0 / @as(f64, 2 * (11 - k) + 1);
    return @as(f64, @floatFromInt(exponent)) + 2 * y * series / ln_2;
}

test "log2 is accurate" {
    var x: f32 = 1e-20;
    while (x < 1e20) : (x *= 1.37) {
        try std.testing.expectApproxEqAbs(std.math.log2(@as(f64, x)), log2(x), 1e-13);
    }
}

test "merging halves gives the whole" {
    const gpa = std.testing.allocator;
    const buffer = try gpa.alignedAlloc(f32, .@"64", 3 * State.floats(1, 16));
    defer gpa.free(buffer);
    var memory: []align(64) f32 = buffer;
    const total_state = State.carve(&memory, 1, 16);
    const a = State.carve(&memory, 1, 16);
    const b = State.carve(&memory, 1, 16);
    for ([_]State{ total_state, a, b }) |state| state.reset();
    // Logits 1 and 3 with values 10 and 20.
    a.top[0] = 1;
    a.sums[0] = 1;
    a.outputs[0] = 10;
    b.top[0] = 3;
    b.sums[5] = 1;
    b.outputs[0] = 20;
    total_state.merge(a);
    total_state.merge(b);
    try std.testing.expectApproxEqRel(
        @as(f32, (10 * 0.25 + 20) / 1.25),
        total_state.outputs[0] / total_state.total(0),
        1e-6,
    );
    try std.testing.expectApproxEqRel(@as(f32, @log(2.0 + 8.0)), total_state.log_sum_exp(0), 1e-6);
}
