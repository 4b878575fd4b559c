//! The allocator of everything that is not a page. Used by abi.zig and scratch.zig.
const std = @import("std");
const builtin = @import("builtin");

pub const gpa: std.mem.Allocator = if (builtin.cpu.arch.isWasm())
    std.heap.wasm_allocator
else if (builtin.link_libc)
    std.heap.c_allocator
else
    std.heap.smp_allocator;
