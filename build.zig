//! zig build                 the shared library for -Dtarget and kvz.wasm, into PREFIX/kvz/
//! zig build test            unit tests (-Dtest-filter=NAME; -fqemu and -fwine run foreign ones)
//! zig build agent           what tests/foreign.py runs a foreign library with, into PREFIX/bin/
//!
//! Kernels are compiled once per ISA level and linked into one library; dispatch.zig picks at load.
const std = @import("std");

/// One compilation of the kernels. Its name goes into the table that the object exports.
const Level = struct {
    name: []const u8,
    cpu: std.Target.Query.CpuModel,
    add: std.Target.Cpu.Feature.Set = .empty,
};

// Container-level: inside a function `&.{...}` would point at the stack. Best first.
const x86_levels = [_]Level{
    .{
        .name = "x86_64_v4",
        .cpu = .{ .explicit = &std.Target.x86.cpu.x86_64_v4 },
        .add = std.Target.x86.featureSet(&.{.avx512vnni}),
    },
    .{ .name = "x86_64_v3", .cpu = .{ .explicit = &std.Target.x86.cpu.x86_64_v3 } },
    .{ .name = "x86_64_v2", .cpu = .{ .explicit = &std.Target.x86.cpu.x86_64_v2 } },
};
const arm_levels = [_]Level{
    .{
        .name = "neon_dotprod",
        .cpu = .baseline,
        .add = std.Target.aarch64.featureSet(&.{.dotprod}),
    },
    .{ .name = "neon", .cpu = .baseline },
};
const apple_levels = [_]Level{.{
    .name = "neon_dotprod",
    .cpu = .{ .explicit = &std.Target.aarch64.cpu.apple_m1 },
}};
const wasm_levels = [_]Level{.{ .name = "wasm_simd128", .cpu = .baseline }};

fn levels_of(target: std.Target) []const Level {
    return switch (target.cpu.arch) {
        .x86_64 => &x86_levels,
        .aarch64 => if (target.os.tag == .macos) &apple_levels else &arm_levels,
        .wasm32 => &wasm_levels,
        else => @panic("kvz has kernels for x86_64, aarch64 and wasm32"),
    };
}

pub fn build(b: *std.Build) void {
    const install = b.getInstallStep();
    const test_step = b.step("test", "Run the unit tests");

    const target = b.standardTargetOptions(.{});
    const optimize = b.option(std.lang.Optimize, "optimize", "default: fast") orelse .fast;
    const strip = b.option(
        bool,
        "strip",
        "no symbols; default: unless debug",
    ) orelse (optimize != .debug);
    const filters = b.option(
        []const []const u8,
        "test-filter",
        "only tests whose name contains this",
    ) orelse &.{};

    const into: std.Build.Step.InstallArtifact.Options = .{
        .dest_dir = .{ .override = .{ .custom = "kvz" } },
        .implib_dir = .disabled,
        .pdb_dir = .disabled,
        .h_dir = .disabled,
    };
    install.dependOn(&b.addInstallArtifact(shared_library(b, target, optimize, strip), into).step);
    install.dependOn(&b.addInstallArtifact(wasm_module(b, optimize, strip), into).step);

    const tests = b.addTest(.{
        .root_module = module(b, "zig/root.zig", target, optimize, false),
        .use_llvm = true,
        .filters = filters,
    });
    const named = options(b, levels_of(target.result)[levels_of(target.result).len - 1 ..]);
    // Another CPU's tests can run in an emulator only.
    named.addOption(bool, "emulated", target.result.cpu.arch != @import("builtin").cpu.arch);
    tests.root_module.addOptions("options", named);
    test_step.dependOn(&b.addRunArtifact(tests).step);

    const agent_step = b.step("agent", "Build the program that calls a foreign library");
    agent_step.dependOn(&b.addInstallArtifact(agent(b, target), .{ .pdb_dir = .disabled }).step);
}

fn agent(b: *std.Build, target: std.Build.ResolvedTarget) *std.Build.Step.Compile {
    const declared = module(b, "zig/abi.zig", target, .fast, true);
    declared.addOptions("options", options(b, levels_of(target.result)));
    const root = module(b, "tests/agent.zig", target, .fast, true);
    root.addImport("abi", declared);
    return b.addExecutable(.{ .name = "agent", .root_module = root, .use_llvm = true });
}

fn shared_library(
    b: *std.Build,
    target: std.Build.ResolvedTarget,
    optimize: std.lang.Optimize,
    strip: bool,
) *std.Build.Step.Compile {
    const levels = levels_of(target.result);
    const root = module(b, "zig/root.zig", target, optimize, strip);
    root.addOptions("options", options(b, levels));
    if (levels.len == 1) {
        // One level: the whole library is compiled for it.
        root.resolved_target = b.resolveTargetQuery(at_level(target, levels[0]));
    } else for (levels) |level| {
        const kernels = module(
            b,
            "zig/isa.zig",
            b.resolveTargetQuery(at_level(target, level)),
            optimize,
            strip,
        );
        const name = b.addOptions();
        name.addOption([]const u8, "isa", level.name);
        kernels.addOptions("options", name);
        root.addObject(
            b.addObject(.{ .name = level.name, .root_module = kernels, .use_llvm = true }),
        );
    }
    const library = b.addLibrary(.{
        .name = "kvz",
        .linkage = .dynamic,
        .root_module = root,
        .use_llvm = true, // debug builds too: the kernels name LLVM intrinsics
    });
    if (target.result.os.tag == .macos) {
        library.install_name = "@rpath/libkvz.dylib";
        library.headerpad_max_install_names = true; // wheel tools may rewrite the install name
    }
    return library;
}

/// The target with the CPU of `level`.
fn at_level(target: std.Build.ResolvedTarget, level: Level) std.Target.Query {
    var query = target.query;
    query.cpu_arch = target.result.cpu.arch;
    query.os_tag = target.result.os.tag;
    query.abi = target.result.abi;
    query.cpu_model = level.cpu;
    query.cpu_features_add = level.add;
    query.cpu_features_sub = .empty;
    return query;
}

fn wasm_module(b: *std.Build, optimize: std.lang.Optimize, strip: bool) *std.Build.Step.Compile {
    const target = b.resolveTargetQuery(.{
        .cpu_arch = .wasm32,
        .os_tag = .freestanding,
        .cpu_model = .{ .explicit = &std.Target.wasm.cpu.generic },
        .cpu_features_add = std.Target.wasm.featureSet(
            &.{ .simd128, .bulk_memory, .nontrapping_fptoint, .sign_ext },
        ),
    });
    const root = module(b, "zig/root.zig", target, optimize, strip);
    root.addOptions("options", options(b, &wasm_levels));
    const executable = b.addExecutable(.{ .name = "kvz", .root_module = root, .use_llvm = true });
    executable.entry = .disabled;
    executable.rdynamic = true; // keeps every export
    executable.stack_size = 256 * 1024;
    executable.initial_memory = 2 << 20;
    executable.max_memory = 4 << 30;
    return executable;
}

fn options(b: *std.Build, levels: []const Level) *std.Build.Step.Options {
    const names = b.allocator.alloc([]const u8, levels.len) catch @panic("out of memory");
    for (names, levels) |*name, level| name.* = level.name;
    const step = b.addOptions();
    step.addOption([]const []const u8, "levels", names);
    return step;
}

fn module(
    b: *std.Build,
    root: []const u8,
    target: std.Build.ResolvedTarget,
    optimize: std.lang.Optimize,
    strip: bool,
) *std.Build.Module {
    const wasm = target.result.cpu.arch.isWasm();
    // Without libc threads would not be the host's; on Windows there is no need of it.
    const libc = !wasm and target.result.os.tag != .windows;
    return b.createModule(.{
        .root_source_file = b.path(root),
        .target = target,
        .optimize = optimize,
        .strip = strip,
        .link_libc = libc,
        .single_threaded = wasm,
        .pic = if (wasm) null else true,
        .unwind_tables = if (target.result.os.tag == .windows) null else .none,
        .omit_frame_pointer = true,
    });
}
