use std::process::ExitCode;

fn main() -> ExitCode {
    match cuvee::cli::parse(std::env::args_os()) {
        Ok(cli) => cuvee::cli::execute(cli),
        Err(failure) => failure.report(),
    }
}
