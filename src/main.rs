//! The `evenkeel` program: everything is in the library, under `cli`.

fn main() -> std::process::ExitCode {
    evenkeel::cli::main()
}
