//! Links the shared library of an installed core: QUANTRATURE_PREFIX is what `cmake --install --prefix` was given.
use std::{env, path::Path};

fn main() {
    let prefix = env::var("QUANTRATURE_PREFIX").expect("QUANTRATURE_PREFIX must name the prefix of the installed core");
    for folder in ["lib", "lib64", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"] {
        let folder = Path::new(&prefix).join(folder);
        if folder.is_dir() {
            println!("cargo:rustc-link-search=native={}", folder.display());
            println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
        }
    }
    println!("cargo:rustc-link-lib=dylib=quantrature");
    println!("cargo:rerun-if-env-changed=QUANTRATURE_PREFIX");
}
