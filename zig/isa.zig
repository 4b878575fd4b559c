//! Root of the per-ISA objects: exports this build's kernel table under its own name, nothing else.
//! build.zig compiles it once for every level that dispatch.zig can pick.
const kernels = @import("kernels.zig");

comptime {
    const name = "kvz_kernels_" ++ @import("options").isa;
    @export(&kernels.table, .{ .name = name, .visibility = .hidden });
}
