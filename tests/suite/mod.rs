mod architecture;
mod documents;
mod folder;
mod golden;
mod process;
mod server;
mod support;
mod tables;
