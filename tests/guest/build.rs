//! Links the guest as a freestanding, static, fixed-address ELF with the layout of `link.ld`.

fn main() {
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=src/boot.s");
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,norelro"] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{here}/link.ld");
}
