//! Library root: exports what `abi.zig` declares, once, for native and WebAssembly alike, and names
//! every file with tests.
const std = @import("std");
const abi = @import("abi.zig");

comptime {
    @setEvalBranchQuota(10_000);
    for (@typeInfo(abi).@"struct".decl_names) |name| {
        const declaration = @field(abi, name);
        if (@typeInfo(@TypeOf(declaration)) == .@"fn") @export(
            &declaration,
            .{ .name = "kvz_" ++ name },
        );
    }
}

/// Nothing is installed into the threads of the host process.
pub const std_options: std.Options = .{ .signal_stack_size = null };

test {
    _ = abi;
    _ = @import("abi_policy.zig");
    _ = @import("abi_quantize.zig");
    _ = @import("abi_sequence.zig");
    _ = @import("abi_snapshot.zig");
    _ = @import("accumulate.zig");
    _ = @import("ahead.zig");
    _ = @import("append.zig");
    _ = @import("attend.zig");
    _ = @import("attend_many.zig");
    _ = @import("block.zig");
    _ = @import("cache.zig");
    _ = @import("config.zig");
    _ = @import("cpu.zig");
    _ = @import("convert.zig");
    _ = @import("digest.zig");
    _ = @import("dispatch.zig");
    _ = @import("dot.zig");
    _ = @import("encode.zig");
    _ = @import("encode_k.zig");
    _ = @import("evict.zig");
    _ = @import("exp2.zig");
    _ = @import("fill.zig");
    _ = @import("format.zig");
    _ = @import("input.zig");
    _ = @import("inspect.zig");
    _ = @import("k_format.zig");
    _ = @import("kept.zig");
    _ = @import("kernels.zig");
    _ = @import("manifest.zig");
    _ = @import("mapping.zig");
    _ = @import("memory.zig");
    _ = @import("message.zig");
    _ = @import("narrow.zig");
    _ = @import("pool.zig");
    _ = @import("pool_test.zig");
    _ = @import("prepare.zig");
    _ = @import("quality.zig");
    _ = @import("quantize.zig");
    _ = @import("recode.zig");
    _ = @import("request.zig");
    _ = @import("rotate.zig");
    _ = @import("rows.zig");
    _ = @import("score.zig");
    _ = @import("scratch.zig");
    _ = @import("slab.zig");
    _ = @import("snapshot.zig");
    _ = @import("snapshot_kept.zig");
    _ = @import("softmax.zig");
    _ = @import("spill.zig");
    _ = @import("state.zig");
    _ = @import("status.zig");
    _ = @import("step.zig");
    _ = @import("sync.zig");
    _ = @import("table.zig");
    _ = @import("threads.zig");
    _ = @import("tier.zig");
    _ = @import("tier_test.zig");
    _ = @import("tile.zig");
    _ = @import("tile_values.zig");
    _ = @import("vec.zig");
    _ = @import("window.zig");
}
