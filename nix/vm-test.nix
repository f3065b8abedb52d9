# A NixOS machine that serves the demo model on CPU, through a restart and two switches. It needs nixpkgs, KVM and 8 GB:
#   nix build .#checks.x86_64-linux.vm
{
  pkgs,
  module,
  packages,
}:
pkgs.testers.runNixOSTest {
  name = "yap-text";

  nodes.machine = {
    imports = [ module ];

    services.yap-text = {
      enable = true;
      package = packages.serve-cpu;
      demo = true;
    };
    # As an administrator would: a limit of ours, and one that we do not set.
    systemd.services.yap-text.serviceConfig = {
      TimeoutStopSec = 60;
      MemoryMax = "7G";
    };

    specialisation = {
      setting.configuration.services.yap-text.settings.CHAT_MAX_OUT = 50;
      address.configuration.services.yap-text = {
        host = "::1";
        port = 9000;
      };
      waiting.configuration.services.yap-text.waitForReady = true;
    };

    environment.systemPackages = [
      packages.serve-cpu
      pkgs.curl
    ];
    system.switch.enable = true;
    virtualisation = {
      cores = 2;
      memorySize = 8192;
      diskSize = 4096;
    };
  };

  testScript =
    { nodes, ... }:
    ''
      def switch(specialisation):
          system = f"${nodes.machine.system.build.toplevel}{specialisation}"
          machine.succeed(f"{system}/bin/switch-to-configuration test", timeout=1800)

      def process():
          return machine.succeed("systemctl show -P MainPID yap-text").strip()

      def wait_ready():
          machine.wait_until_succeeds("systemctl is-active yap-text", timeout=1800)

      def answers(address):
          question = "What is the capital of France?"
          answer = machine.succeed(f"yap-text warmup --url ws://{address}/ws '{question}'", timeout=300)
          assert "Paris" in answer, answer

      with subtest("the boot does not wait for the models, and the socket takes connections at once"):
          machine.wait_for_unit("multi-user.target")
          machine.succeed("systemctl is-active yap-text.socket")
          wait_ready()
          answers("127.0.0.1:8000")

      with subtest("what an administrator sets counts"):
          shown = machine.succeed("systemctl show -P TimeoutStopUSec -P MemoryMax yap-text").split()
          assert sorted(shown) == ["1min", str(7 * 2**30)], shown

      with subtest("a restart refuses no connection"):
          before = process()
          machine.succeed("systemctl restart --no-block yap-text")
          asks = "curl -s -o /dev/null --max-time 900 http://127.0.0.1:8000/livez"
          machine.succeed(f"for i in $(seq 100); do {asks} || exit 1; sleep 0.1; done", timeout=1800)
          wait_ready()
          assert process() != before
          answers("127.0.0.1:8000")

      with subtest("a setting: the switch does not wait, and the port stays open"):
          before = process()
          switch("/specialisation/setting")
          assert "activating" in machine.execute("systemctl is-active yap-text")[1]
          machine.succeed("curl -s -o /dev/null --max-time 900 http://127.0.0.1:8000/livez", timeout=1000)
          wait_ready()
          assert process() != before
          answers("127.0.0.1:8000")

      with subtest("an address: the socket moves"):
          switch("/specialisation/address")
          wait_ready()
          machine.fail("curl -s http://127.0.0.1:8000/livez")
          answers("[::1]:9000")

      with subtest("waitForReady: the switch is done when the service is ready"):
          switch("/specialisation/waiting")
          answers("127.0.0.1:8000")
          switch("")
          wait_ready()
    '';
}
